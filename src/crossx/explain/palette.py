"""Colours for figures, distinguishable with every common colour vision deficiency.

Okabe and Ito, "Color Universal Design", https://jfly.uni-koeln.de/color/.
"""

BLACK = "#000000"
BLUE = "#0072b2"
GREEN = "#009e73"
ORANGE = "#e69f00"
PURPLE = "#cc79a7"
SKY_BLUE = "#56b4e9"
VERMILION = "#d55e00"
YELLOW = "#f0e442"

DARK_BLUE = "#003a5c"
"""Not of that set: a shade of ``BLUE`` that is also distinct from the others in grey print."""
