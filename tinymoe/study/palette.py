"""Colours, markers and letters of all figures, of the page of routes and of the terminal. It loads no matplotlib."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito
MARKERS = "osD^vPX"
DIVERGING = ("#1F5E9E", "#78B0DA", "#F7F7F7", "#F5A34C", "#C44E00")  # the low end is the darker one, also in grey
# Chosen so that the smallest CIEDE2000 difference is 20, also as seen with protanopia, deuteranopia and tritanopia
# (Machado et al. 2009). Experts beyond the eighth share colours; their numbers tell them apart.
EXPERTS = ("#5028C8", "#F0F028", "#A02828", "#78F0C8", "#C87850", "#C8C8F0", "#287878", "#A078F0")


def symbol(byte: int) -> str:
    """One visible character for a byte: itself in ASCII, ↵ newline, → tab, ¤ another control byte, · above 127."""
    return {9: "→", 10: "↵"}.get(byte) or ("·" if byte > 127 else chr(byte) if 32 <= byte < 127 else "¤")


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))


def is_light(colour: str) -> bool:
    """Whether black text reads better on it than white."""
    return sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), rgb(colour))) > 110


INKS = tuple("#000" if is_light(colour) else "#fff" for colour in EXPERTS)  # of text on the colours of EXPERTS
