"""Where the workflow lies, for Snakefiles that use it.

The Snakefile, its rules, scripts, captions, environments and profiles are in this folder of an
installed package, and at the root of a checkout.
"""

from pathlib import Path

HERE = Path(__file__).parent


def folder() -> Path:
    """The folder that has the Snakefile.

    >>> (folder() / "Snakefile").exists()
    True
    """
    return HERE if (HERE / "Snakefile").exists() else HERE.parents[1]


def snakefile() -> str:
    """The Snakefile, as the `module` of another workflow takes it:

        from ensdistill.workflow import snakefile

        module study:
            snakefile: snakefile()
            config: config

        use rule * from study

    >>> open(snakefile(), encoding="utf-8").readline()
    '# The whole study, from raw images to tables and figures:\\n'
    """
    return str(folder() / "Snakefile")
