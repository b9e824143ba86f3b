"""The shufflers of a run: started on the nodes that have their rows, and replaced if they die.

If the data is in one place, there are as many shufflers as the configuration says. If its shards
are on nodes' own disks, each node is asked which it has, each shard goes to one of the nodes that
have it, and each of these nodes runs a shuffler. The rows of a window then travel from each node in
one record batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from downpour.cluster.config.derive import make_decoder
from downpour.cluster.config.placement import NoPlace, disk_of
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.errors import user_message
from downpour.cluster.ray_backend.members import Members
from downpour.cluster.ray_backend.nodes import SEE_DEADLINE_S, Nodes
from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.errors import DatasetError
from downpour.shuffler.holdings import Holding, Inventory, assign, survey
from downpour.shuffler.spec import ShufflerSpec

SHUFFLER_CALLS = 2
"""That a shuffler answers at a time."""


@dataclass(frozen=True, slots=True)
class _Post:
    """Which rows a shuffler reads, and on which node."""

    share: int = 0
    """The share of the rows that it reads, if the data is in one place."""
    node: str | None = None
    """Id of its node; None if it need not be on a certain one."""
    holding: Holding | None = None
    """The shards that it reads from that node's disk."""


class Shufflers:
    """The shufflers of one run."""

    def __init__(
        self,
        config: RunConfig,
        specs: Sequence[ShufflerSpec],
        nodes: Nodes,
        members: Members,
        living: dict[str, Any] | None = None,
    ) -> None:
        """Start them; does not wait for them.

        Args:
            config: of the run.
            specs: those with the data in one place.
            nodes: of the cluster.
            members: starts and ends actors.
            living: actors that have outlived their driver, by what they are for; those that are
                used here are taken out. A shuffler of a node's own disk is not.

        Raises:
            RunFailed: no node has a certain shard.
        """
        self._config, self._specs, self._nodes, self._members = config, specs, nodes, members
        self._posts = self._find_posts()
        living = {} if living is None else living
        self._actors = [
            living.pop(_role(post), None) or self._start(i, post)
            for i, post in enumerate(self._posts)
        ]
        self._lost: list[Any] = []
        self._coming: tuple[list[_Post], list[Any]] | None = None
        """Those that are to deliver from when they are up, with their posts."""
        self._leaving: list[Any] = []
        """Those that deliver no new window."""

    @property
    def actors(self) -> tuple[Any, ...]:
        """Those that deliver."""
        return tuple(self._actors)

    def deliver(self, epoch: int, batches: tuple[int, ...]) -> list[tuple[Any, Any]]:
        """Have each deliver its rows of a window; gives the parts, each with its shuffler."""
        return [(actor.deliver.remote(epoch, batches), actor) for actor in self._actors]

    def lost(self, actor: Any) -> None:
        """Note that a shuffler died, or is out of reach."""
        self._lost.append(actor)

    def replace(self) -> int:
        """Replace every shuffler that was lost; gives how many those were.

        If a node with shards is gone, other nodes that have the same shards take over.

        Raises:
            RunFailed: none of the nodes left has a certain shard.
        """
        lost = [actor for actor in self._actors if actor in self._lost]
        self._lost.clear()
        if not lost:
            return 0
        self._end_coming()
        pairs = zip(self._posts, self._actors, strict=True)
        left = {post: actor for post, actor in pairs if actor not in lost}
        try:
            self._posts = self._find_posts(staying=True)
        except (NoPlace, RunFailed):  # some rows are only on nodes that are to leave
            self._posts = self._find_posts()
        before = self._actors
        self._actors = [
            left[post] if post in left else self._start(index, post)
            for index, post in enumerate(self._posts)
        ]
        for actor in before:
            if actor in lost:
                self._members.kill(actor)  # it may be out of reach only
            elif actor not in self._actors:
                self._leaving.append(actor)
        return len(lost)

    def move(self, going: Collection[Any]) -> Any:
        """Start others in place of those whose nodes are to leave; `arrived` has them deliver.

        Returns:
            What Ray answers once all of them are up.

        Raises:
            RunFailed: no node that stays has a certain shard.
        """
        self._end_coming()
        pairs = zip(self._posts, self._actors, strict=True)
        left = {post: actor for post, actor in pairs if actor not in going}
        try:
            posts = self._find_posts(staying=True)
        except NoPlace as error:
            raise RunFailed(str(error)) from None
        actors = [
            left[post] if post in left else self._start(index, post)
            for index, post in enumerate(posts)
        ]
        self._coming = (posts, actors)
        up = None
        for actor in actors:  # each answers after the one before
            up = actor.ready.remote() if up is None else actor.ready.remote(up)
        return up

    def arrived(self) -> int:
        """Those that were to come are up: they deliver from now on; gives how many are new."""
        if self._coming is None:  # some were lost, and replaced, meanwhile
            return 0
        before = self._actors
        self._posts, self._actors = self._coming
        self._coming = None
        self._leaving += [actor for actor in before if actor not in self._actors]
        return sum(actor not in before for actor in self._actors)

    @property
    def some_leave(self) -> bool:
        """Whether there are some that deliver no new window."""
        return bool(self._leaving)

    def end_leaving(self, busy: Collection[Any]) -> None:
        """End those that deliver no new window, except the `busy` ones."""
        for actor in [actor for actor in self._leaving if actor not in busy]:
            self._leaving.remove(actor)
            self._members.kill(actor)

    def _end_coming(self) -> None:
        coming, self._coming = self._coming, None
        for actor in coming[1] if coming else ():
            if actor not in self._actors:
                self._members.kill(actor)

    def stop(self) -> None:
        """End them."""
        self._end_coming()
        for actor in [*self._actors, *self._leaving]:
            self._members.kill(actor)

    def _start(self, index: int, post: _Post) -> Any:
        if post.node is None:
            spec = self._specs[post.share]
            scheduling = self._nodes.scheduling("shufflers", post.share)
        else:
            spec = dataclasses.replace(self._specs[0], index=index, holding=post.holding)
            scheduling = NodeAffinitySchedulingStrategy(post.node, soft=False)
        made = self._members.start(ShufflerActor, SHUFFLER_CALLS, spec, scheduling=scheduling)
        if post.node is None:
            self._members.has_role(_role(post), made)
        return made

    def _find_posts(self, *, staying: bool = False) -> list[_Post]:
        """Who is to read what; from disks of nodes that are `staying` only, if that is asked."""
        data = self._config.data
        if data.node_folder is None:
            return [_Post(share) for share in range(len(self._specs))]
        inventory = Inventory.read(data.data, data.train_split)
        nodes = {node.id: node for node in self._nodes.disks(only_staying=staying)}
        uris = {id: disk_of(data.node_folder, node) for id, node in nodes.items()}
        look: Any = ray.remote(survey)
        calls = {
            id: look.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(id, soft=False)
            ).remote(uri, inventory, make_decoder(self._config), self._config.model.num_classes)
            for id, uri in uris.items()
        }
        held = {id: self._answer(call, nodes[id].address) for id, call in calls.items()}
        try:
            holdings = assign(inventory, held, uris)
        except DatasetError as error:
            raise RunFailed(str(error)) from None
        return [_Post(node=id, holding=holding) for id, holding in holdings.items()]

    def _answer(self, call: Any, address: str) -> Sequence[str]:
        """The shards that a node has; none if it is gone before it answers."""
        try:
            names: Sequence[str] = ray.get(call, timeout=SEE_DEADLINE_S)
        except RayTaskError as error:
            message = user_message(error)
            if message is None:
                raise
            raise RunFailed(f"node {address}: {message}") from None
        except RayError:
            return ()
        return names


def _role(post: _Post) -> str:
    """What a shuffler is for, in the notes of `members`."""
    return f"shuffler {post.share}" if post.node is None else f"shuffler on {post.node}"
