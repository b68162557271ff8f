"""What a Jupyter notebook shows: tables as HTML, and whether this process is one."""

import sys
from collections.abc import Container, Iterable, Sequence
from html import escape

from nemoquant.words import plain


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook.

    Nothing is imported: a kernel has loaded ipykernel and IPython itself.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "ipykernel" in sys.modules and hasattr(shell, "kernel")


def html_table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], right: Container[int] = ()
) -> str:
    """A table as HTML; all text in it is escaped, integers get their commas.

    Args:
        right: numbers of the right-aligned columns, from 0.
    """

    def line(tag: str, cells: Sequence[object]) -> str:
        drawn = (
            f'<{tag} style="text-align: {"right" if i in right else "left"}">{_text(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(drawn)}</tr>"

    head = f"<thead>{line('th', header)}</thead>" if header else ""
    body = "".join(line("td", cells) for cells in rows)
    return f"<p>{_text(caption)}</p><table>{head}<tbody>{body}</tbody></table>"


def _text(cell: object) -> str:
    shown = f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
    return escape(plain(shown))
