"""Colours and markers of all figures and of the terminal. Importing it loads no matplotlib."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
