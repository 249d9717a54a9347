"""Generated rows of token ids whose domains follow different rules: where a router has something to find.

    chains    a row opens with its domain's tag and goes on as x[t+1] = rule_d(x[t]), with a random jump now and then.
    ciphers   a row opens with its domain's tag, shows a word, and then the word enciphered: y[i] = rule_d(x[i]).

rule_d is one permutation of the alphabet a domain, all drawn at random, so the domains share nothing. In `chains`, the
current token is one half of what decides, the domain the other. In `ciphers`, attention has to fetch the letter first,
and the current token says nothing about it: the rule can only be chosen, and applied, from the hidden state.
Shapes: R rows, T tokens of a row, D domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

JUMPS = 0.1
"""Share of the steps of a chain that go anywhere, so that no row is part of another; they are not scored."""


@dataclass(frozen=True)
class RuleRows:
    """ids [R, T]; domain [R]; scored [R, T]: True at tokens that the rule determines; vocab: number of tokens."""

    ids: np.ndarray
    domain: np.ndarray
    scored: np.ndarray
    vocab: int


def chains(seed: int, rows: int, *, length: int = 128, domains: int = 16, alphabet: int = 256) -> RuleRows:
    """Rows of chains; tags follow the alphabet. The rules are drawn once, whatever the seed: it draws the rows."""
    rules = permutations("chains", domains, alphabet)
    rng = np.random.default_rng([seed, rows])
    domain = np.arange(rows) % domains
    ids = np.empty((rows, length), dtype=np.int64)
    ids[:, 0] = alphabet + domain
    ids[:, 1] = rng.integers(alphabet, size=rows)
    jump = rng.random((rows, length)) < JUMPS
    anywhere = rng.integers(alphabet, size=(rows, length))
    for t in range(2, length):
        ids[:, t] = np.where(jump[:, t], anywhere[:, t], rules[domain, ids[:, t - 1]])
    scored = ~jump
    scored[:, :2] = False
    return RuleRows(ids, domain, scored, alphabet + domains)


def ciphers(seed: int, rows: int, *, words: int = 1, word: int = 3, domains: int = 16, alphabet: int = 64) -> RuleRows:
    """Rows of tag, word, mark, enciphered word, so many times: 2 * words * (word + 1) tokens. The seed draws the words.

    Tokens: the alphabet, the tags, the mark. The rules are drawn once, whatever the seed.
    """
    rules = permutations("ciphers", domains, alphabet)
    domain = np.arange(rows) % domains
    plain = np.random.default_rng([seed, rows]).integers(alphabet, size=(rows, words, word))
    tag = np.broadcast_to(alphabet + domain[:, None, None], (rows, words, 1))
    mark = np.full_like(tag, alphabet + domains)
    secret = rules[domain[:, None, None], plain]
    ids = np.concatenate([tag, plain, mark, secret], axis=2)
    scored = np.zeros(ids.shape, dtype=bool)
    scored[:, :, word + 2 :] = True
    return RuleRows(ids.reshape(rows, -1), domain, scored.reshape(rows, -1), alphabet + domains + 1)


def permutations(name: str, domains: int, size: int) -> np.ndarray:
    """[D, size]: a permutation for each domain, always the same for a name."""
    rng = np.random.default_rng([domains, size, *name.encode()])
    return np.stack([rng.permutation(size) for _ in range(domains)])
