"""Pictures to texts and back, in one space.

Equal captions are one text. A picture may have several texts, and a text several pictures: a query is right if any that
belongs to it is among the k nearest. Of others with equal similarity half count before it, so that a constant answer
does not win by order. Shape legend: Q queries, A answers, E width of the space.
"""

from collections.abc import Sequence

import numpy as np

KS = (1, 5, 10)
CHUNK = 512


def places(queries_QE: np.ndarray, answers_AE: np.ndarray, own: Sequence[Sequence[int]]) -> np.ndarray:
    """The place (from 0) of each query's best own answer among those that are not its own."""
    found = np.empty(len(queries_QE))
    for start in range(0, len(queries_QE), CHUNK):
        similarity = queries_QE[start : start + CHUNK].astype(np.float32) @ answers_AE.astype(np.float32).T
        mine = np.zeros(similarity.shape, bool)
        for row, answers in zip(mine, own[start : start + CHUNK]):
            row[list(answers)] = True
        best = np.where(mine, similarity, -np.inf).max(1)[:, None]
        before = ((similarity > best) & ~mine).sum(1) + ((similarity == best) & ~mine).sum(1) / 2
        found[start : start + CHUNK] = before
    return found


def distinct(captions: Sequence[Sequence[str]]) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """All different captions; which of them belong to each picture; and which pictures to each of them."""
    texts = sorted({text for own in captions for text in own})
    place = {text: i for i, text in enumerate(texts)}
    of_pictures = [[place[text] for text in own] for own in captions]
    of_texts: list[list[int]] = [[] for _ in texts]
    for picture, own in enumerate(of_pictures):
        for text in own:
            of_texts[text].append(picture)
    return texts, of_pictures, of_texts
