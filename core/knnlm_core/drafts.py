"""Drafts: what a sequence may go on with, read off the entries behind those that agreed with it so far.

neighbours ──those that hold the token that came──►  the entries after them: leads
leads      ──values of these entries and of those behind them──►  outlook: a few tokens ahead along each lead
outlook    ──the token that most of the weight agrees on, then along those leads alone──►  guesses

Any runtime can verify several guesses in one pass for little more than the cost of one. Leads decide only what is
verified, never what is generated: a wrong guess costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from knnlm_core.mixture import Found
from knnlm_core.retrieval import Retrieval, Searchable

MAX_LEADS = 16

Ids = npt.NDArray[np.int64]


class Leads(NamedTuple):
    """Entries that may hold the next token of a sequence."""

    sources: Ids  # (M,) which of its retrieval's datastores, M ≤ MAX_LEADS
    entry_ids: Ids  # (M,)
    weights: npt.NDArray[np.float64]  # (M,) share of p_knn that their predecessors had when they were found


NO_LEADS = Leads(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


class Outlook(NamedTuple):
    """Leads and the tokens along them."""

    leads: Leads
    tokens: Ids  # (M, L), −1 from where a document ends or an entry is hidden

    def after(self, came: Sequence[int]) -> Leads:
        """The leads that foresaw all of the tokens that came, moved behind them; fewer than L tokens."""
        if not len(self.leads.entry_ids):
            return NO_LEADS
        agrees = (self.tokens[:, : len(came)] == np.asarray(came, np.int64)).all(axis=1)
        agrees &= self.tokens[:, len(came)] >= 0
        sources, entry_ids, weights = (column[agrees] for column in self.leads)
        return Leads(sources, entry_ids + len(came), weights)


NO_OUTLOOK = Outlook(NO_LEADS, np.empty((0, 1), np.int64))


class Guess(NamedTuple):
    """A token that may come, if all guesses before it do."""

    token_id: int
    share: float  # of the weight of the leads that are left, 0 … 1
    support: float  # share of p_knn that its leads stand for, 0 … 1


def find_leads(
    found: Found,
    rows: Sequence[int],
    tokens: Sequence[int],
    retrievals: Sequence[Retrieval],
) -> list[Leads]:
    """The entries behind the neighbours that held the token that came.

    Args:
        found: for a step; a row without neighbours gives no leads.
        rows: (R,) rows of ``found``; several sequences may fork from one.
        tokens, retrievals: R of them.
    Raises: KnnlmError: a datastore could not be read.
    """
    at = torch.tensor(rows, device=found.lmbda.device)
    ids, values = (found.neighbors[column][at].cpu().numpy() for column in (0, 2))
    log_weights, sources = found.log_weights[at].cpu().numpy(), found.sources.cpu().numpy()
    holds = (ids >= 0) & (values == np.asarray(tokens, np.int64)[:, None])
    row, column = np.nonzero(holds & (holds.cumsum(axis=1) <= MAX_LEADS))
    following = np.full(len(row), -1, np.int64)
    for datastore, members in _by_datastore(row, sources[column], retrievals):
        following[members] = datastore.next_entry(torch.from_numpy(ids[row[members], column[members]])).numpy()
    goes_on = following >= 0
    row, column, following = row[goes_on], column[goes_on], following[goes_on]
    weights = np.exp(log_weights[row, column].astype(np.float64))
    ends = np.cumsum(np.bincount(row, minlength=len(rows)))
    parts = zip(*(np.split(part, ends[:-1]) for part in (sources[column], following, weights)), strict=True)
    return [Leads(*columns) for columns in parts]


def look_ahead(leads: Sequence[Leads], retrievals: Sequence[Retrieval], length: int) -> list[Outlook]:
    """The next ``length`` tokens along the leads of R sequences, as the datastores are now.

    Raises: KnnlmError: a datastore could not be read.
    """
    counts = [len(each.entry_ids) for each in leads]
    row = np.repeat(np.arange(len(leads)), counts)
    sources, entry_ids = (np.concatenate([each[i] for each in leads]) for i in (0, 1))
    tokens = np.full((len(row), length), -1, np.int64)
    for datastore, members in _by_datastore(row, sources, retrievals):
        tokens[members] = datastore.continuations(torch.from_numpy(entry_ids[members]), length).numpy()
    return [Outlook(*pair) for pair in zip(leads, np.split(tokens, np.cumsum(counts)[:-1]), strict=True)]


def guess(outlook: Outlook, length: int) -> list[Guess]:
    """The likeliest next tokens, each on the condition of those before it: at most ``length``, of L."""
    guesses: list[Guess] = []
    alive = list(zip(outlook.leads.weights.tolist(), outlook.tokens.tolist(), strict=True))
    for depth in range(length):
        mass: dict[int, float] = {}
        for weight, tokens in alive:
            if tokens[depth] >= 0:
                mass[tokens[depth]] = mass.get(tokens[depth], 0.0) + weight
        if not mass:
            break
        token = max(mass, key=lambda token: (mass[token], -token))
        total = sum(weight for weight, _ in alive)
        guesses.append(Guess(token, mass[token] / total if total else 0.0, mass[token]))
        alive = [(weight, tokens) for weight, tokens in alive if tokens[depth] == token]
    return guesses


def _by_datastore(row: Ids, sources: Ids, retrievals: Sequence[Retrieval]) -> list[tuple[Searchable, Ids]]:
    """Datastores with the members of ``row`` (N,) and ``sources`` (N,) that are theirs."""
    groups: dict[Searchable, list[Ids]] = {}
    for pair in np.unique(np.stack([row, sources]), axis=1).T if len(row) else ():
        datastore = retrievals[pair[0]].sources[pair[1]].datastore
        groups.setdefault(datastore, []).append(np.flatnonzero((row == pair[0]) & (sources == pair[1])))
    return [(datastore, np.concatenate(members)) for datastore, members in groups.items()]
