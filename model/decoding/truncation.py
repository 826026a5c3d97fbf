"""Stages that reshape the distribution by its own form: temperature, and what cuts the tail or the head.

Tokens with equal logits are treated alike: where a cut falls among them, all stay. So no outcome hangs on the order
in which a sort leaves ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from topkapi.model.decoding.noise import row_keys, uniform_of_keys
from topkapi.model.decoding.stage import LOWEST, NARROW, NOT_CHOSEN, Candidates, Floats, Row, Values, stage

# Where a cut by probability mass looks first, and where next if that does not hold enough; the last holds all. Most
# cuts fall among the few thousand likeliest tokens, so that the rest is never sorted.
LOG_PROBABLE = (math.log(1e-4), math.log(1e-5), math.log(1e-6), LOWEST)
# Probability mass is added up in these units, as whole numbers: no order of adding can change the sum.
UNIT = 2.0**-50
# XTC throws one coin per token of text: the noise of a token id that no vocabulary has.
COIN = -1
# Beyond these a float32 divided by it is infinite, or no number.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-20, 3e38


def divisors(temperatures: NDArray[np.float64]) -> Floats:
    """What logits are divided by at these temperatures."""
    found: Floats = np.clip(temperatures, SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE).astype(np.float32)
    return found


@stage(keeps_best=True, scans=True)
def temperature(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Divide by the temperature, itself moved by the entropy where `dynamic_temperature_range` asks for it."""
    divisor, reach = values["temperature"], values["dynamic_temperature_range"]
    if bool((reach > 0).any()):
        certain = candidates.count < 2
        relative = candidates.entropy / candidates.count.double().log().masked_fill(certain, 1.0)
        # relative ** exponent, by functions that give a value the same bits wherever it stands in a tensor.
        place = (relative.clamp(1e-300, 1.0).log() * values["dynamic_temperature_exponent"]).exp()
        low, high = (divisor - reach).clamp(min=0), divisor + reach
        divisor = torch.where((reach > 0) & ~certain, low + (high - low) * place, divisor)
    divisor = torch.from_numpy(divisors(divisor.numpy())).unsqueeze(-1)
    if candidates.scan is not None:
        scan = candidates.scan.divide(divisor.squeeze(-1).numpy())
        if scan is not None:
            return Candidates(scan, candidates.vocab_size)
    if candidates.on_cpu:
        # A quarter of what torch 2.13 takes, which wakes its threads for it.
        divided = torch.from_numpy(candidates.logits.numpy() / divisor.numpy())
    else:
        divided = candidates.logits / divisor.to(candidates.logits.device)
    return Candidates(divided, candidates.vocab_size, candidates.ids)


@stage(keeps_best=True, scans=True)
def top_k(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """The k most likely tokens."""
    return candidates.largest(values["top_k"].clamp(max=candidates.vocab_size).long())


@stage(keeps_best=True, scans=True)
def top_p(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """The most likely tokens whose probability reaches p."""
    wanted, totals = values["top_p"].numpy(), candidates.log_total.numpy()
    near = probable(candidates)
    ordered = -np.sort(-near.host(), axis=-1)
    mass = _mass(totals[:, None] - ordered.astype(np.float64))
    at = (mass < wanted[:, None] / UNIT).sum(axis=-1)
    last = ordered[np.arange(len(at)), np.minimum(at, ordered.shape[-1] - 1)]
    short = np.flatnonzero(at == ordered.shape[-1]).tolist()
    if not short:
        return near.at_least(torch.from_numpy(last))
    for row in short:
        last[row] = _nucleus(candidates.row(row).host()[0], float(totals[row]), float(wanted[row]))
    return candidates.at_least(torch.from_numpy(last))


def probable(candidates: Candidates) -> Candidates:
    """The tokens among which nearly every cut by probability falls; of few candidates all."""
    if candidates.ids is not None and candidates.logits.shape[-1] <= NARROW:
        return candidates
    return candidates.at_least(candidates.log_total + LOG_PROBABLE[0])


def _nucleus(logits: Floats, total: float, p: float) -> float:
    """The smallest logit of the nucleus of one row `[K]`, which reaches far."""
    for log_probable in LOG_PROBABLE[1:]:
        ordered = -np.sort(-logits[logits >= np.float32(max(total + log_probable, LOWEST))])
        mass = _mass(total - ordered.astype(np.float64))
        if len(mass) and mass[-1] >= p / UNIT:
            return float(ordered[np.searchsorted(mass, p / UNIT)])
    return LOWEST


@stage(keeps_best=True, scans=True)
def min_p(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Tokens at least `min_p` times as likely as the most likely one."""
    return candidates.at_least(candidates.best.double().cpu() + values["min_p"].log())


@stage(scans=True)
def typical_p(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """The tokens whose information is nearest to the entropy, until their probability reaches p."""
    wanted, totals, entropy = values["typical_p"].numpy(), candidates.log_total.numpy(), candidates.entropy.numpy()
    near = probable(candidates)
    information = totals[:, None] - near.host().astype(np.float64)
    distance = np.abs(information - entropy[:, None])
    order = distance.argsort(axis=-1)
    mass = _mass(np.take_along_axis(information, order, axis=-1))
    at = (mass < wanted[:, None] / UNIT).sum(axis=-1)
    places = np.arange(len(at)), order[np.arange(len(at)), np.minimum(at, order.shape[-1] - 1)]
    reach = distance[places]
    missed = at == order.shape[-1]
    if near is not candidates:
        # What was left aside is farther away than this; the cut must fall nearer.
        missed |= reach >= -LOG_PROBABLE[0] - entropy
        if missed.any():
            for row in np.flatnonzero(missed).tolist():
                logits = candidates.row(row).host()[0]
                reach[row] = _typical(logits, float(totals[row]), float(entropy[row]), float(wanted[row]))
            # A hair wider, for the floor is compared in float32; what lies exactly where is looked at below.
            near, missed = candidates.at_least(torch.from_numpy(totals - entropy - reach - 1e-3)), np.isinf(reach)
            distance = np.abs(totals[:, None] - near.host().astype(np.float64) - entropy[:, None])
    return near.where(torch.from_numpy(distance <= np.where(missed, np.inf, reach)[:, None]))


def _typical(logits: Floats, total: float, entropy: float, p: float) -> float:
    """How far from the entropy the information of a token of one row `[K]` may be, where that is far."""
    for log_probable in LOG_PROBABLE[1:]:
        information = total - logits[logits >= np.float32(max(total + log_probable, LOWEST))].astype(np.float64)
        distance = np.abs(information - entropy)
        order = distance.argsort()
        mass = _mass(information[order])
        at = int(np.searchsorted(mass, p / UNIT))
        if at < len(mass) and distance[order[at]] < -log_probable - entropy:
            return float(distance[order[at]])
    return math.inf


def _mass(information: NDArray[np.float64]) -> NDArray[np.int64]:
    """The running sum of the probabilities of tokens with this information (nats), in `UNIT`s."""
    return np.cumsum(np.rint(np.exp(-information) / UNIT).astype(np.int64), axis=-1)


@stage(keeps_best=True, scans=True)
def epsilon_cutoff(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Tokens at least this probable."""
    return candidates.at_least(candidates.log_total + values["epsilon_cutoff"].log())


@stage(keeps_best=True, scans=True)
def eta_cutoff(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Tokens at least as probable as min(eta, sqrt(eta) * exp(-entropy))."""
    eta = values["eta_cutoff"].log()
    return candidates.at_least(candidates.log_total + torch.minimum(eta, eta / 2 - candidates.entropy))


@stage(keeps_best=True)
def top_n_sigma(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Tokens whose logit is within n standard deviations of the largest; ruled out tokens don't count."""
    possible = None if candidates.whole else candidates.logits > NOT_CHOSEN
    below = candidates.best.unsqueeze(-1) - candidates.logits
    if possible is not None:
        below = below.masked_fill(~possible, 0.0)
    mean = candidates.sum(below) / candidates.count
    deviation = below - mean.to(below).unsqueeze(-1)
    if possible is not None:
        deviation = deviation.masked_fill(~possible, 0.0)
    sigma = (candidates.sum(deviation.square()) / candidates.count).sqrt()
    return candidates.at_least(candidates.best.double().cpu() - values["top_n_sigma"] * sigma)


@stage(keeps_best=True, scans=True)
def top_a(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Tokens at least as probable as a times the square of the largest probability."""
    best = candidates.best.double().cpu()
    return candidates.at_least(2 * best - candidates.log_total + values["top_a"].log())


@stage(scans=True)
def xtc(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """By chance, remove all but the least likely of the tokens above the threshold (exclude top choices)."""
    chance = uniform_of_keys(row_keys(rows), torch.tensor([COIN])).squeeze(-1)
    top = candidates.at_least(candidates.log_total + values["xtc_threshold"].log())
    least = top.logits.masked_fill(top.logits == NOT_CHOSEN, math.inf).amin(dim=-1, keepdim=True)
    removed = (top.logits > least) & (chance < values["xtc_probability"]).unsqueeze(-1)
    row, column = removed.numpy().nonzero()
    assert top.ids is not None
    flat, _ = candidates.locate(row, top.ids.numpy()[row, column])
    return candidates.put(flat, NOT_CHOSEN)


@stage(keeps_best=True, scans=True)
def mirostat(candidates: Candidates, values: Values, rows: Sequence[Row]) -> Candidates:
    """Tokens whose surprise, in bits, is at most the row's present bound."""
    bound = torch.tensor([surprise_bound(row) for row in rows], dtype=torch.float64)
    return candidates.at_least(candidates.log_total - bound * math.log(2))


def surprise_bound(row: Row) -> float:
    """The bound of mirostat for the next token; it starts at twice the surprise aimed for.

    Bounds are remembered by position, so that a token that is chosen again is chosen under the same bound.
    """
    bounds = row.surprise_bounds
    if not bounds:
        bounds.append(2 * row.parameters.mirostat_tau)
    return bounds[min(row.position, len(bounds) - 1)]


def observe_surprise(row: Row, logprob: float) -> None:
    """Correct the bound after a token with this log-probability (nats) was chosen at the row's present position."""
    bound = surprise_bound(row)
    error = -logprob / math.log(2) - row.parameters.mirostat_tau
    position = min(row.position, len(row.surprise_bounds) - 1)
    row.surprise_bounds[position + 1 :] = [bound - row.parameters.mirostat_eta * error]
