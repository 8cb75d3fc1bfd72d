"""Sizes that compiled loops and who makes memory for them agree on."""

LANES = 16  # columns of a vector of sums
COLUMNS = 2 * LANES  # of a panel of the right operand; the last panel may have LANES
ROWS = {1: 14, 2: 12}  # of a block, by its vectors of columns: with these the registers hold the sums
MOST_ROWS = max(ROWS.values())
APART = 64  # bytes between what would share a line of the cache, a power of two apart

LINE = 32  # sums of a row of float64, side by side: see reference.add_up
ROW = 1024  # elements: their words, patterns, codes and fields take 13 KB
# Elements of a small tensor: it is kept as int8 codes, for packing them would take longer than it saves memory, and its
# layer makes each pass in one call.
FEW = 1 << 16
CHUNK = 1 << 16  # elements a task; fixed, so that sums do not depend on the number of threads


def chunks(elements: int) -> int:
    """Tasks of CHUNK elements."""
    return -(-elements // CHUNK)
