"""Sizes that the loops over blocks (tile_loops) and who makes memory for them (int8_tiles) agree on."""

LANES = 16  # columns of a vector of sums
COLUMNS = 2 * LANES  # of a panel of the right operand; the last panel may have LANES
ROWS = {1: 14, 2: 12}  # of a block, by its vectors of columns: with these the registers hold the sums
MOST_ROWS = max(ROWS.values())
