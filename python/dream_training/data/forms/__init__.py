"""The forms that training data comes in, told apart by their columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from dream_training.data.forms import columns as _columns
from dream_training.data.forms import flag_embedding, own, tevatron
from dream_training.data.training_row import TrainingRow, keys_of

Parse = Callable[[Mapping[str, Any], str], TrainingRow]

# In the order in which they are tried.
_FORMS = (own, tevatron, flag_embedding, _columns)


def find_form(columns: Collection[str], where: str) -> Parse:
    """Return the function that reads rows with these columns.

    Raises:
        ValueError: no form has them; the message begins with ``where`` and lists the forms.
    """
    for form in _FORMS:
        if form.fits(columns):
            return form.parse
    forms = "; ".join(f"({form.COLUMNS})" for form in _FORMS)
    raise ValueError(
        f"{where}: its keys are {keys_of(dict.fromkeys(columns))}, which is no known form; "
        f"expected one of {forms}; or text alone, to train without questions"
    )
