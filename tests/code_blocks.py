"""The code in documents: model cards, and the pages of the gallery."""

import re


def code_blocks(text):
    """The Python blocks of a Markdown text, in their order."""
    return re.findall(r"```python\n(.*?)```", text, re.S)
