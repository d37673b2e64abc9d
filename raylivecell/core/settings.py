"""What every part of a recipe is: a frozen pydantic model that refuses fields it does not know."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Base of all `*Config` models; the string under a field is its documentation (shown in `--help`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
