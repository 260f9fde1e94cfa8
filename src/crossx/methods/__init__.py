"""Methods: a published network and its objective a file, all on the contract of ``base``."""

from crossx.methods.base import Method, Objective, Phase
from crossx.methods.crossx import CrossX
from crossx.methods.dfl import DFL
from crossx.methods.dt_ram import DTRAM
from crossx.methods.fcan import FCAN
from crossx.methods.kernel_pooling import KernelPooling
from crossx.methods.ma_cnn import MACNN
from crossx.methods.mamc import MAMC
from crossx.methods.maxent import MaxEnt
from crossx.methods.nts import NTSNet
from crossx.methods.pdisconet import PDiscoNet
from crossx.methods.plain import Plain
from crossx.methods.pn_cnn import PNCNN
from crossx.methods.probe import Probe
from crossx.methods.ra_cnn import RACNN
from crossx.methods.registry import create_method, list_methods, method_class, method_options, register_method

__all__ = [
    "DFL",
    "DTRAM",
    "FCAN",
    "MACNN",
    "MAMC",
    "PNCNN",
    "RACNN",
    "CrossX",
    "KernelPooling",
    "MaxEnt",
    "Method",
    "NTSNet",
    "Objective",
    "PDiscoNet",
    "Phase",
    "Plain",
    "Probe",
    "create_method",
    "list_methods",
    "method_class",
    "method_options",
    "register_method",
]
