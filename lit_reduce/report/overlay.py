"""The kept tokens painted on the picture: dropped cells are dimmed, kept regions outlined."""

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageEnhance

from lit_reduce.ops.tiles import tiling

OUTLINE = (255, 196, 0)
DIM = 0.35
COLOUR = 0.25
GAP = 0.02  # between an overview and the whole, in parts of the height


def paintable(grid: tuple[int, int, int], count: int) -> bool:
    """Whether `overlay` can paint an image's tokens: they lie on one grid, or on an overview and one of all crops."""
    return grid[0] == 1 and (grid[1] * grid[2] == count or tiling(grid, count) is not None)


def overlay(
    picture: Image.Image, grid: tuple[int, int, int], count: int, kept: Iterable[int], shortest: int = 672
) -> Image.Image:
    """Paint the kept tokens of one picture; where it was cut into crops, its overview stands on the left.

    Args:
        picture: What the model saw: the grid covers all of it, and so does the overview.
        grid: Frames (1), rows and columns of its visual tokens, the overview left out.
        count: Its visual tokens, with overview and newlines.
        kept: Indices of the tokens that stayed. Newlines are not seen.
        shortest: Smaller pictures are enlarged until their shorter side has this many pixels.

    Returns:
        A new RGB picture.

    Raises:
        ValueError: The tokens are not `paintable`.
    """
    if not paintable(grid, count):
        raise ValueError(f"cannot paint {count} tokens on a grid of {grid}")
    tiles = tiling(grid, count)
    if tiles is None:
        return paint(picture, grid, kept, shortest)
    stays, (rows, columns) = set(kept), tiles.overview
    crops = {int(tiles.place[token]) for token in stays} - {-1}
    whole = paint(picture, (1, *tiles.whole), crops, shortest)
    own = {token - tiles.first for token in stays if 0 <= token - tiles.first < rows * columns}
    first = paint(picture, (1, rows, columns), own, shortest)
    gap = round(GAP * whole.height)
    both = Image.new("RGB", (first.width + gap + whole.width, whole.height), "white")
    both.paste(first, (0, 0))
    both.paste(whole, (first.width + gap, 0))
    return both


def paint(picture: Image.Image, grid: tuple[int, int, int], kept: Iterable[int], shortest: int = 672) -> Image.Image:
    """Paint the kept cells of one grid.

    Args:
        picture: What the model saw, already cropped: the grid covers all of it.
        grid: Frames (1), rows and columns of its visual tokens.
        kept: Raster indices of the tokens that stayed.
        shortest: Smaller pictures are enlarged until their shorter side has this many pixels.

    Returns:
        A new RGB picture.

    Raises:
        ValueError: More than one frame, or an index outside the grid.
    """
    frames, rows, columns = grid
    cells = set(kept)
    if frames != 1 or not all(0 <= cell < rows * columns for cell in cells):
        raise ValueError(f"cannot paint {len(cells)} tokens on a grid of {grid}")
    scale = max(1.0, shortest / min(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    bright = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    dimmed = ImageEnhance.Brightness(ImageEnhance.Color(bright).enhance(COLOUR)).enhance(DIM)
    xs = [round(column * size[0] / columns) for column in range(columns + 1)]
    ys = [round(row * size[1] / rows) for row in range(rows + 1)]
    for cell in cells:
        row, column = divmod(cell, columns)
        box = (xs[column], ys[row], xs[column + 1], ys[row + 1])
        dimmed.paste(bright.crop(box), box)
    _outline(dimmed, cells, columns, xs, ys)
    return dimmed


def _outline(canvas: Image.Image, cells: set[int], columns: int, xs: list[int], ys: list[int]) -> None:
    """A line wherever a kept cell touches a dropped one or the edge; between two kept cells it would only clutter."""
    draw = ImageDraw.Draw(canvas)
    width = max(2, min(canvas.size) // 224)
    inset = width // 2
    for cell in cells:
        row, column = divmod(cell, columns)
        left, right = xs[column] + inset, xs[column + 1] - inset - 1
        top, bottom = ys[row] + inset, ys[row + 1] - inset - 1
        if row == 0 or cell - columns not in cells:
            draw.line((left - inset, top, right + inset, top), OUTLINE, width)
        if row == len(ys) - 2 or cell + columns not in cells:
            draw.line((left - inset, bottom, right + inset, bottom), OUTLINE, width)
        if column == 0 or cell - 1 not in cells:
            draw.line((left, top - inset, left, bottom + inset), OUTLINE, width)
        if column == columns - 1 or cell + 1 not in cells:
            draw.line((right, top - inset, right, bottom + inset), OUTLINE, width)
