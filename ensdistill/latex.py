r"""Plain text in LaTeX that compiles with every engine, pdfLaTeX without any package among them."""

import unicodedata

ACCENTS = dict(zip(map(chr, range(0x300, 0x303 + 1)), "`'^~", strict=True))
ACCENTS |= {"\u0304": "=", "\u0306": "u", "\u0307": ".", "\u0308": '"', "\u030a": "r"}
ACCENTS |= {"\u030b": "H", "\u030c": "v", "\u0327": "c"}
"""Commands of accents, by the combining character."""


UNICODE_ENGINE = r"\ifdefined\Umathcode"
"""XeTeX and LuaTeX have this command; pdfTeX skips what follows unread."""


def _commands(characters: str, commands: str, form: str) -> dict[str, str]:
    return {
        character: form.format(command)
        for character, command in zip(characters, commands.split(), strict=True)
    }


CHARACTERS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{plain: f"\\{plain}" for plain in "{}$&#%_"},
    **{plain: f"{{{plain}}}" for plain in "[*"},  # or the end of a row would take them
    **{plain: f"${plain}$" for plain in "<>|"},  # the font of text has other signs there
    **_commands("−²³", "- ^2 ^3", "${}$"),
    **_commands(
        "±×÷·≤≥≈≠∞→↑↓µ",
        "pm times div cdot le ge approx ne infty to uparrow downarrow mu",
        r"$\{}$",
    ),
    "°": r"$^\circ$",
    **_commands("–—‘’“”", "-- --- ` ' `` ''", "{}"),
    **_commands("…ßæÆœŒøØłŁı", "dots ss ae AE oe OE o O l L i", r"\{}{{}}"),
    **_commands(
        "αβγδεζηθικλμνξπρςστυφχψω",
        "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho "
        "varsigma sigma tau upsilon varphi chi psi omega",
        r"$\{}$",
    ),
    **_commands(
        "ΓΔΘΛΞΠΣΥΦΨΩ", "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega", r"$\{}$"
    ),
    # Other Greek capitals, and omicron, are set as the Latin letters that they resemble.
    **_commands("ΑΒΕΖΗΙΚΜΝΟΡΤΧο", "A B E Z H I K M N O P T X o", "{}"),
}


def latex(text: str) -> str:
    r"""Text in LaTeX: Greek letters in math, accents and signs as commands, all in ASCII.

    What has no command there, such as Chinese, is shown by XeLaTeX and LuaLaTeX if the font has
    it; pdfLaTeX shows its code point instead.

    >>> print(latex("KD+ODS, η 1/255 & café"))
    KD+ODS, $\eta$ 1/255 \& caf\'{e}
    """
    return "".join(map(_character, unicodedata.normalize("NFC", text)))


def _character(one: str) -> str:
    if one in CHARACTERS or one.isascii():
        return CHARACTERS.get(one, one)
    letter, *marks = [*unicodedata.normalize("NFD", one)]
    if len(marks) == 1 and letter.isascii() and marks[0] in ACCENTS:
        return rf"\{ACCENTS[marks[0]]}{{{letter}}}"
    return rf"{UNICODE_ENGINE} {one}\else U+{ord(one):04X}\fi{{}}"
