"""Documents into rows: splitting, best-fit packing, fill-in-the-middle, and the tensors of a batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.shards import Documents
from data.tokenizer import FimIds

IGNORE = -100  # a label that counts for nothing
PADDING = -1  # the document id of padding
FIM_MARKS = 3  # tokens that fill-in-the-middle adds to a document


class Piece(NamedTuple):
    """`length` tokens of a document from `start` on; with `cuts`, of the document as it is rearranged."""

    documents: Documents
    number: int
    start: int
    length: int
    cuts: tuple[int, int] | None = None


def split_long(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents as pieces of at most `capacity` tokens: (index into lengths, start, length) of each piece."""
    counts = -(-lengths // capacity)
    index = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(index)) - first[index]) * capacity
    return index, start, np.minimum(capacity, lengths[index] - start)


def joined_pieces(pieces: list[Piece], capacity: int) -> list[Piece]:
    """The same tokens in few pieces of at most `capacity`: neighbours in a document become one."""
    whole: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.documents.order, p.number, p.start)):
        if whole and piece == whole[-1]._replace(
            start=whole[-1].start + whole[-1].length, length=piece.length
        ):
            whole[-1] = whole[-1]._replace(length=whole[-1].length + piece.length)
        else:
            whole.append(piece)
    return [
        piece._replace(start=piece.start + at, length=min(capacity, piece.length - at))
        for piece in whole
        for at in range(0, piece.length, capacity)
    ]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `capacity`: longest first, each into the fullest bin that
    takes it (Ding et al. 2024, arXiv 2404.10830). The spaces in use are bits of one integer, so that the
    smallest sufficient one is found by a shift and the lowest set bit."""
    bins: list[list[int]] = []
    spaces = 0  # bit s: some bin has exactly s tokens left
    bins_with: dict[int, list[int]] = {}
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[item]
        sufficient = spaces >> length
        if sufficient:
            space = length + (sufficient & -sufficient).bit_length() - 1
            holders = bins_with[space]
            chosen = holders.pop()
            if not holders:
                spaces ^= 1 << space
            bins[chosen].append(item)
        else:
            space, chosen = capacity, len(bins)
            bins.append([item])
        left = space - length
        if left:
            bins_with.setdefault(left, []).append(chosen)
            spaces |= 1 << left
    return bins


def tokens_of(piece: Piece, fim: FimIds | None) -> np.ndarray:
    """The piece's ids, [length]."""
    ids = piece.documents[piece.number]
    if piece.cuts is not None and fim is not None:
        ids = rearranged(ids, piece.cuts, fim)
    return ids[piece.start : piece.start + piece.length]


def rearranged(ids: np.ndarray, cuts: tuple[int, int], fim: FimIds) -> np.ndarray:
    """A document as prefix, suffix, middle, end mark (PSM; Bavarian et al. 2022, arXiv 2207.14255)."""
    a, b = cuts
    prefix, middle, suffix, end = ids[:a], ids[a:b], ids[b:-1], ids[-1:]
    return np.concatenate([[fim.begin], prefix, [fim.hole], suffix, [fim.end], middle, end]).astype(ids.dtype)


def assemble(
    rows: list[list[np.ndarray]], *, seq_len: int, mtp_depth: int, fill: int
) -> dict[str, np.ndarray]:
    """A batch (int64) from rows of documents: input_ids, labels, position_ids, document_ids [B, S], next_ids
    [B, S, mtp_depth]. Padding has input id `fill`, document id -1 and no labels; a row may be all padding."""
    shape = (len(rows), seq_len)
    ids, labels = np.full(shape, fill, np.int64), np.full(shape, IGNORE, np.int64)
    following = np.full((*shape, mtp_depth), IGNORE, np.int64)
    documents = np.full(shape, PADDING, np.int64)
    positions = np.empty(shape, np.int64)
    count = np.arange(seq_len)
    for row, pieces in enumerate(rows):
        at = 0
        for number, piece in enumerate(pieces):
            end = at + len(piece)
            ids[row, at:end] = piece
            labels[row, at : end - 1] = piece[1:]
            for k in range(min(mtp_depth, len(piece) - 2)):
                following[row, at : end - 2 - k, k] = piece[2 + k :]
            documents[row, at:end] = number
            positions[row, at:end] = count[: len(piece)]
            at = end
        positions[row, at:] = count[: seq_len - at]
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "document_ids": documents,
        "next_ids": following,
    }
