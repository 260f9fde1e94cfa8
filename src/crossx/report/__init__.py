"""A trained run as one HTML page: what to show, charts and markup. Pure rendering: no network, no torch."""

from crossx.report.choice import Choice, choose_examples
from crossx.report.examples import Pictures
from crossx.report.page import render
from crossx.report.tested import Tested

__all__ = ["Choice", "Pictures", "Tested", "choose_examples", "render"]
