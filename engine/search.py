"""Beam search and contrastive search: branches of one prompt that are read like any sequences and chosen together."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor

from topkapi.engine.request import Finished, FinishReason, GenerateJob, StopCheck, Token
from topkapi.engine.scheduler import common_prefix
from topkapi.engine.sequences import (
    Choosing,
    Sequence,
    Submitted,
    end_of,
    layers_of,
    limit_of,
    token_event,
)
from topkapi.model.cache import NetworkOutput
from topkapi.model.config import ModelConfig
from topkapi.model.decoding.choosing import check_logits, choose, nothing_left
from topkapi.model.decoding.grammar import Constraint
from topkapi.model.decoding.search import extensions, least_alike, likeliest
from topkapi.model.decoding.stage import Row

Copy = Callable[[int, int, int, int], None]


class Branch(Sequence):
    """One of the ways that a search looks into. The first one reads the prompt; the others start as its copies."""

    def __init__(self, search: Search, index: int) -> None:
        super().__init__(search.owner, index, list(search.job.prompt) if index == 0 else [])
        self.search = search
        self.row = Row(search.job.parameters, self.tokens, len(search.job.prompt), index, search.config.end_token_ids)

    @property
    def over_at_once(self) -> FinishReason | None:
        return "length" if self.search.limit == 0 else None

    @property
    def group(self) -> Collection[Sequence]:
        return self.search.branches

    @property
    def reusable(self) -> int:
        return self.search.reusable(self)

    @property
    def layers(self) -> tuple[int, ...]:
        return layers_of(self.search.job, self.search.config)

    def work_left(self) -> tuple[int, int]:
        return super().work_left()[0], self.search.limit - max(0, len(self.tokens) - len(self.search.job.prompt))

    def states(self, count: int) -> int:
        return self.search.states(self, count)

    def receive(self, output: NetworkOutput, guesses: list[int]) -> Search | None:
        self.search.read(self, output)
        if len(output.logits):
            self.output = output
            self.row.early = output.early[:, -1] if len(output.early) else None
        return self.search if all(branch.output is not None for branch in self.search.awaited) else None

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.search.finish(reason)


class Search(Choosing):
    """A job whose next tokens are chosen for several branches at once."""

    def __init__(self, owner: Submitted, job: GenerateJob, config: ModelConfig, width: int) -> None:
        self.owner, self.job, self.config = owner, job, config
        self.limit = limit_of(job, config)
        self.explained = job.parameters.logprobs is not None or job.parameters.trace
        self.branches = [Branch(self, index) for index in range(width)]
        self.awaited = self.branches[:1]

    def reusable(self, branch: Branch) -> int:
        """How many tokens of a branch may come from the cache."""
        return max(0, len(branch.tokens) - 1)

    def states(self, branch: Branch, count: int) -> int:
        """Of how many of a branch's next `count` tokens final states are needed."""
        return 0

    def read(self, branch: Branch, output: NetworkOutput) -> None:
        """Told of every output of a branch, those from the midst of the prompt too."""

    @abstractmethod
    def advance(self, copy: Copy) -> None:
        """Choose from the outputs of all branches that were awaited."""

    @abstractmethod
    def finish(self, reason: FinishReason) -> None:
        """End with what there is."""

    def grow(self, children: list[tuple[Branch, int]], copy: Copy) -> list[Branch]:
        """Go on with these (branch, next token): the branch of each child. They are read next.

        The first child of a branch stays in it; others take over branches that have none, with the part of the cache
        in which the two differ.
        """
        parents = {parent for parent, _ in children}
        idle = (branch for branch in self.branches if branch not in parents)
        places: list[Branch] = []
        for parent, _ in children:
            place = next(idle) if parent in places else parent
            if place is not parent:
                start = common_prefix(place.tokens[: place.computed], parent.tokens[: parent.computed])
                if parent.slot is not None and place.slot is not None and start < parent.computed:
                    copy(parent.slot, place.slot, start, parent.computed)
                place.tokens[:], place.computed = parent.tokens, parent.computed
            places.append(place)
        for place, (_, token_id) in zip(places, children, strict=True):
            place.tokens.append(token_id)
        for branch in self.branches:
            branch.output = None
        self.awaited = places
        return places

    def explain(self, logits: Tensor, rows: list[Row], token_ids: list[int]) -> list[Token]:
        """The tokens as events, with log-probabilities and trace where the job asked for them."""
        if not self.explained:
            return [Token(0, token_id) for token_id in token_ids]
        return [token_event(0, choice) for choice in choose(logits, rows, token_ids)]

    def end(self) -> None:
        """No branch goes on."""
        for branch in self.branches:
            branch.done = True


@dataclass(eq=False)
class Beam:
    """An open continuation: its branch, the sum of its log-probabilities, and its tokens so far."""

    branch: Branch
    score: float
    tokens: list[Token]
    constraint: Constraint | None
    stop_check: StopCheck | None


@dataclass
class Hypothesis:
    """A continuation that could be the answer."""

    score: float
    tokens: list[Token]
    reason: FinishReason
    stop_reason: str | int | None


@dataclass
class BeamGroup:
    """Beams that compete with each other, and the complete continuations they have led to, best first."""

    width: int
    beams: list[Beam]
    complete: list[Hypothesis] = field(default_factory=list)


class BeamSearch(Search):
    """Keeps the likeliest continuations; what all of them agree on is handed out at once."""

    def __init__(self, owner: Submitted, job: GenerateJob, config: ModelConfig) -> None:
        width, groups = job.parameters.num_beams, job.parameters.num_beam_groups
        super().__init__(owner, job, config, width)
        self.handed_out = 0
        # All groups begin with the prompt, which the first branch reads.
        self.groups = [
            BeamGroup(width // groups, [Beam(
                self.branches[0], 0.0, [],
                job.constraint(0) if job.constraint else None, job.stop_check(0) if job.stop_check else None,
            )])
            for _ in range(groups)
        ]  # fmt: skip

    def advance(self, copy: Copy) -> None:
        if self.owner.prefilled_at is None:
            self.owner.prefilled_at = time.monotonic()
        taken: Counter[int] = Counter()
        for group in self.groups:
            if group.beams:
                self._extend(group, taken)
        beams = [beam for group in self.groups for beam in group.beams]
        if not beams:
            self._conclude()
            return
        branches = self.grow([(beam.branch, beam.tokens[-1].token_id) for beam in beams], copy)
        for beam, branch in zip(beams, branches, strict=True):
            beam.branch = branch
        self._hand_out_common()

    def finish(self, reason: FinishReason) -> None:
        for group in self.groups:
            # Even an answer that is complete might not have been the best in the end.
            group.complete = [replace(each, reason=reason, stop_reason=None) for each in group.complete]
            group.complete += [self._hypothesis(beam, reason, None) for beam in group.beams]
        self._conclude()

    def _extend(self, group: BeamGroup, taken: Counter[int]) -> None:
        """One token more for each beam of a group; `taken` counts the tokens that earlier groups took just now."""
        parameters = self.job.parameters
        rows = []
        for beam in group.beams:
            # Two groups may start from one branch, so each has a row of its own.
            rows.append(replace(beam.branch.row, constraint=beam.constraint))
        outputs = [beam.branch.output for beam in group.beams]
        logits = torch.stack([output.logits[-1] for output in outputs if output is not None])
        check_logits(logits)
        # As many as there may be ends among the best, so that enough are left to go on.
        ends = 1 + len({*self.config.end_token_ids, *parameters.stop_token_ids})
        penalties = {token_id: parameters.diversity_penalty * count for token_id, count in taken.items()}
        ways = extensions(logits, rows, [beam.score for beam in group.beams], max(2, ends) * group.width, penalties)
        if not ways:
            if not group.complete:
                raise nothing_left([0])
            group.beams = []
            return
        tokens = self.explain(
            logits[[way.beam for way in ways]], [rows[way.beam] for way in ways], [way.token_id for way in ways]
        )
        kept: list[Beam] = []
        for number, (way, token) in enumerate(zip(ways, tokens, strict=True)):
            parent = group.beams[way.beam]
            beam = Beam(
                parent.branch,
                way.score,
                [*parent.tokens, token],
                parent.constraint.copy() if parent.constraint else None,
                parent.stop_check.copy() if parent.stop_check else None,
            )
            at_limit = len(beam.tokens) == self.limit
            end = end_of(way.token_id, at_limit, self.job, self.config, beam.constraint, beam.stop_check)
            if end is None:
                kept.append(beam)
            elif number < group.width:
                group.complete.append(self._hypothesis(beam, *end))
            if len(kept) == group.width:
                break
        group.complete = sorted(group.complete, key=attrgetter("score"), reverse=True)[: group.width]
        group.beams = [] if self._settled(group, kept) else kept
        taken.update(beam.tokens[-1].token_id for beam in group.beams)

    def _settled(self, group: BeamGroup, kept: list[Beam]) -> bool:
        """Whether no open beam is worth going on with: there are enough complete ones, and none looks better."""
        if not kept or len(group.complete) < group.width:
            return not kept
        hopeful = self._hypothesis(kept[0], "length", None).score > group.complete[-1].score
        return self.job.parameters.early_stopping or not hopeful

    def _hypothesis(self, beam: Beam, reason: FinishReason, stop_reason: str | int | None) -> Hypothesis:
        length = max(1, len(beam.tokens))
        score = beam.score / length**self.job.parameters.length_penalty
        return Hypothesis(score, beam.tokens, reason, stop_reason)

    def _hand_out_common(self) -> None:
        """Events of the tokens that every possible answer begins with."""
        possible: list[list[Token]] = []
        for group in self.groups:
            possible += [beam.tokens for beam in group.beams] + [each.tokens for each in group.complete]
        first, *others = possible
        while self.handed_out < len(first) and all(
            self.handed_out < len(tokens) and tokens[self.handed_out] is first[self.handed_out] for tokens in others
        ):
            self._hand_out(first[self.handed_out : self.handed_out + 1], range(self.job.parameters.n))
            self.handed_out += 1

    def _hand_out(self, tokens: list[Token], indexes: Collection[int]) -> None:
        self.owner.events += [replace(token, index=index) for token in tokens for index in indexes]

    def _conclude(self) -> None:
        self.end()
        found = sorted((h for group in self.groups for h in group.complete), key=attrgetter("score"), reverse=True)
        for index in range(self.job.parameters.n):
            # A vocabulary with fewer ways to answer than were asked for repeats the last.
            answer = found[min(index, len(found) - 1)]
            self._hand_out(answer.tokens[self.handed_out :], (index,))
            self.owner.events.append(Finished(index, answer.reason, answer.stop_reason, answer.score))


class ContrastiveSearch(Search):
    """Reads each of the likeliest next tokens and goes on with the one least like the text so far."""

    def __init__(self, owner: Submitted, job: GenerateJob, config: ModelConfig) -> None:
        super().__init__(owner, job, config, job.parameters.top_k)
        self.row = Row(job.parameters, list(job.prompt), len(job.prompt), 0, config.end_token_ids)
        self.row.constraint = job.constraint(0) if job.constraint else None
        self.stop_check = job.stop_check(0) if job.stop_check else None
        self._context: list[Tensor] = []
        self._known = 0
        self._candidates: list[tuple[Branch, Token, float]] = []

    def reusable(self, branch: Branch) -> int:
        return self._known if self._known < len(self.job.prompt) else super().reusable(branch)

    def states(self, branch: Branch, count: int) -> int:
        if self._known < len(self.job.prompt):
            return max(0, branch.computed + count - self._known)
        return 1 if count == branch.pending else 0

    def read(self, branch: Branch, output: NetworkOutput) -> None:
        if self._known < len(self.job.prompt):
            self._context.append(output.states)
            self._known += len(output.states)

    def advance(self, copy: Copy) -> None:
        if self.owner.prefilled_at is None:
            self.owner.prefilled_at = time.monotonic()
        winner = self.branches[0]
        if self._candidates:
            winner = self._choose()
            if winner.done:
                return
        assert winner.output is not None
        logits = winner.output.logits[-1:]
        check_logits(logits)
        self.row.early = winner.row.early
        token_ids, probabilities = likeliest(logits, self.row, len(self.branches))
        if not token_ids:
            raise nothing_left([0])
        count = len(token_ids)
        tokens = self.explain(logits.expand(count, -1), [self.row] * count, token_ids)
        places = self.grow([(winner, token_id) for token_id in token_ids], copy)
        self._candidates = list(zip(places, tokens, probabilities.tolist(), strict=True))

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.end()
        self.owner.events += [Finished(index, reason, stop_reason) for index in range(self.job.parameters.n)]

    def _choose(self) -> Branch:
        """Take the best of the candidates, now that all of them have been read."""
        outputs = [branch.output for branch, _, _ in self._candidates]
        states = torch.cat([output.states for output in outputs if output is not None])
        probabilities = torch.tensor([each[2] for each in self._candidates], dtype=torch.float64)
        context = torch.cat(self._context)
        at = least_alike(probabilities, states, context, self.job.parameters.penalty_alpha)
        branch, token, _ = self._candidates[at]
        self._context = [context, states[at : at + 1]]
        self.row.tokens.append(token.token_id)
        self.owner.events += [replace(token, index=index) for index in range(self.job.parameters.n)]
        at_limit = self.row.position == self.limit
        end = end_of(token.token_id, at_limit, self.job, self.config, self.row.constraint, self.stop_check)
        if end is not None:
            self.finish(*end)
        return branch
