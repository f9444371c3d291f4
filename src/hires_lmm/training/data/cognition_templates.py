"""How the questions of cognition alignment are worded, and which fields a wording may use."""

from collections.abc import Iterable, Sequence

from .conversations import IMAGE_MARK


PIXEL_FIELDS = ("image", "left", "right", "top", "bottom", "rows", "cols")
CODE_FIELDS = (
    *("image", "num_codes", "last_code", "grid_rows", "grid_cols"),
    *("first_row", "last_row", "first_col", "last_col", "rows", "cols"),
)

PIXEL_TEMPLATES = (
    "Look at the part of {image} between {left}% and {right}% of its width and between {top}% and {bottom}% of its "
    "height. Shrink it to {rows} rows of {cols} pixels and write their colours as red,green,blue from 0 to 255, one "
    "row a line.",
    "Cut a window out of {image}: columns from {left}% to {right}%, rows from {top}% to {bottom}%. Scaled down to "
    "{rows} x {cols} pixels, which red,green,blue values (0 to 255) does it have? Give one line for each row.",
    "Which colours remain when the window of {image} that spans {left}% to {right}% from the left and {top}% to "
    "{bottom}% from the top is averaged to a grid of {rows} rows and {cols} columns? Answer line by line with "
    "red,green,blue triples between 0 and 255.",
    "The corner at {left}% of the width and {top}% of the height opens a quarter of {image}; its other corner lies at "
    "{right}% and {bottom}%. State the mean red,green,blue of each cell when it is divided into {rows} rows and "
    "{cols} columns, one line per row, numbers from 0 to 255.",
    "I reduce a region of {image} to {rows} lines of {cols} pixels. The region starts {top}% down and {left}% across "
    "and ends {bottom}% down and {right}% across. List the pixels as red,green,blue with values up to 255, a line for "
    "each row.",
    "Report pixel values: {image}, from {top}% to {bottom}% vertically, from {left}% to {right}% horizontally, "
    "averaged to {rows} by {cols}. Format: red,green,blue (0-255), rows on separate lines.",
)
"""Wordings of questions for colours, our own; the paper prints none."""

CODE_TEMPLATES = (
    "A codebook of {num_codes} entries describes {image} as a grid of {grid_rows} rows and {grid_cols} columns. Which "
    "entries, numbered from 0, stand in rows {first_row} to {last_row} and columns {first_col} to {last_col}? Write "
    "one row a line.",
    "Encode {image} as {grid_rows} x {grid_cols} codes between 0 and {last_code}. Write the codes of rows {first_row} "
    "to {last_row}, columns {first_col} to {last_col}, one line for each row.",
    "Divide {image} into {grid_rows} rows and {grid_cols} columns of cells. Name the codebook index (0 to "
    "{last_code}) of each of the {rows} x {cols} cells whose first one is in row {first_row}, column {first_col}; "
    "separate rows by line breaks.",
    "For {image}, which of the {num_codes} code vectors comes nearest to each cell? Give the numbers, from 0, of rows "
    "{first_row}-{last_row} and columns {first_col}-{last_col} in the {grid_rows} x {grid_cols} grid, row by row.",
    "Read off the discrete code of {image}: grid {grid_rows} x {grid_cols}, values 0 to {last_code}. I need {rows} "
    "rows of {cols} values, starting at row {first_row} and column {first_col}.",
    "List codebook indices. Picture: {image}. Grid: {grid_rows} rows, {grid_cols} columns. Wanted: rows {first_row} "
    "to {last_row}, columns {first_col} to {last_col}. Indices run from 0 to {last_code}; one line per row.",
)
"""Wordings of questions for codebook indices, our own; rows and columns count from 1, indices from 0."""


def check_templates(templates: Iterable[str], fields: Sequence[str]) -> tuple[str, ...]:
    """Wordings as a tuple; each can be filled from the fields and holds no mark of an image."""
    if isinstance(templates, str) or not (checked := tuple(templates)):
        raise ValueError(f"templates={templates!r} must be a list of texts; leave it out for those of the package.")
    for template in checked:
        if IMAGE_MARK in template:
            raise ValueError(f"The template {template!r} holds {IMAGE_MARK}; write {{image}} there.")
        try:
            template.format(**dict.fromkeys(fields, 0))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"The template {template!r} cannot be filled ({error}); its fields are {', '.join(fields)}."
            ) from error
    return checked
