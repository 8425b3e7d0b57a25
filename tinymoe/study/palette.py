"""Colours and markers of all figures and of the terminal. Nothing is imported here, so that asking for a colour is cheap."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito, colour-blind safe
MARKERS = "osD^vPX"
