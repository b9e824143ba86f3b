"""A vector is cut into pieces that cover it once, in order."""

import pytest

from downpour.paramserver.transport.wire.blocks import BLOCK, PIECE, num_blocks, pieces


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, 2 * PIECE + BLOCK + 3])
def test_pieces_cover_a_vector_once(size: int) -> None:
    found, at = list(pieces(size)), 0
    for piece in found:
        assert piece.start == at
        assert 0 < piece.size <= PIECE
        assert piece.width == BLOCK or piece.rows == 1
        at = piece.stop
    assert at == size
    assert sum(piece.rows for piece in found) == num_blocks(size)
