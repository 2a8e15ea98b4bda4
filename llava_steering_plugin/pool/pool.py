"""A pool of adapters on one model: each row of a batch names its own, and costs no more for the others.

    pool = AdapterPool(model)
    pool.load("cats", "./checkpoints/cats")
    pool.load("pets", "./checkpoints/pets")
    model.generate(ids, images=images, adapter_names=["cats", "__base__", "pets"])

The adapters are no part of the model. Hosts that some adapter works on have one hook each, which looks up what the rows
of the present call need; a generation looks the names up once, when it begins, and keeps what it found to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.hooks import RemovableHandle

from llava_steering_plugin.adapters.fit.base_model import projector_of
from llava_steering_plugin.adapters.fit.compatibility import fits
from llava_steering_plugin.adapters.parts.original import Original
from llava_steering_plugin.adapters.stored.locate import AdapterSource, read
from llava_steering_plugin.errors import ArgumentsError, SteeringError, TokenMapError, nearest
from llava_steering_plugin.hooks.hosts import SharedHooks, dispatch, refuse_shared
from llava_steering_plugin.hooks.owner import ModelOwner, owner_of
from llava_steering_plugin.hooks.parameter_names import PROJECTOR
from llava_steering_plugin.hooks.scope import Scope, current
from llava_steering_plugin.modes.base import ForwardPass
from llava_steering_plugin.pool import row_by_row, row_names
from llava_steering_plugin.pool.adapter import AdapterDetails, PooledAdapter
from llava_steering_plugin.pool.image_features import ImageFeatures, refuse_ready_made
from llava_steering_plugin.pool.newlines import marking, with_newlines
from llava_steering_plugin.pool.projectors import ServedRows, project_by_row
from llava_steering_plugin.pool.reading import pooled
from llava_steering_plugin.pool.residency import Residency

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = row_names.BASE


class AdapterPool(ModelOwner):
    """Own one model and hold any number of adapters for it; rows that name none run on the plain base.

    Threads may generate at once on the one model while others load and unload. Have the model on its device before:
    adapters are moved to where their hosts are when they are first used.

    Args:
        model: the base, as `load_pretrained_model` or `from_pretrained` gives it.
        tokenizer: the base's; needed for adapters with tokens of their own, which it must know already.
        max_resident: how many adapters may be on the model's device. The least recently used of the others wait in
            CPU memory; those in use stay, also above this number.
        original: the base's own parts, where the model was changed for adapters that need more than modules and a
            projector; no row of the base can be in a batch with theirs then.

    Raises:
        SteeringError: the model carries an adapter or a pool already, or no decoder is found in it.
    """

    BASE: ClassVar[str] = BASE

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        max_resident: int | None = None,
        original: Original | None = None,
    ):
        super().__init__(model)
        if max_resident is not None and max_resident < 1:
            raise ArgumentsError(f"max_resident is {max_resident}; at least one adapter must fit on the device")
        self._tokenizer = tokenizer
        self._original = original
        self._lock = threading.Lock()
        self._adapters: dict[str, PooledAdapter] = {}
        self._retired: set[PooledAdapter] = set()
        found = projector_of(model)
        self._projector = found[1] if found is not None else None
        self._newline = self.family.newline()
        self._features = None if self.family.splices else ImageFeatures(model, self._with_image_parts)
        self._hooks = SharedHooks(self._hook)
        self._residency = Residency(self.stack.get_submodule, self._projector, max_resident)
        self.take()
        if self._features is not None:
            self._features.take()

    def load(self, name: str, name_or_path: AdapterSource) -> None:
        """Add an adapter under `name`, or replace the one of that name for all calls that begin from now on.

        Args:
            name: any text but `BASE`.
            name_or_path: adapter folder or hub id, or the adapter as it was read.

        Raises:
            ArgumentsError: the name cannot be used.
            AdapterError: not found, damaged, of another kind, with tensors that do not fit, or one that needs more of
                its base than modules and a projector; nothing has changed then.
            BaseMismatch: the model is not the base that the adapter was trained on.
            SteeringError: the pool was removed from its model.
            RuntimeError: the device has no memory left; nothing has changed then, either.
        """
        if not isinstance(name, str) or not name.strip() or name == BASE:
            raise ArgumentsError(f"an adapter cannot be called {name!r}: {BASE} is the plain model, the rest any text")
        adapter = pooled(name, read(name_or_path, fits(self.model)), self.model, self.shape, self._tokenizer)
        with self._lock:
            if owner_of(self.model) is not self:
                raise SteeringError("this pool has given its model back; make a new one with AdapterPool(model).")
            refuse_shared(self.stack, adapter.modules)
            self._hooks.need(adapter.hosts())
            try:
                self._residency.add(adapter)
            except BaseException:  # the device is full
                self._retire(adapter)
                raise
            before, self._adapters[name] = self._adapters.get(name), adapter
            if before is not None:
                self._retire(before)

    def unload(self, name: str) -> None:
        """Take an adapter out of the pool. Generations that use it keep it to their end.

        Raises:
            ArgumentsError: the pool has none of that name.
        """
        with self._lock:
            if (adapter := self._find(name)) is None:
                raise ArgumentsError(f"{BASE} is the plain model, which cannot be unloaded")
            del self._adapters[name]
            self._retire(adapter)

    def names(self) -> list[str]:
        """Return the names that a row may give: `BASE`, then the adapters in the order of their first loading."""
        with self._lock:
            return [BASE, *self._adapters]

    def details(self, name: str) -> AdapterDetails:
        """Return the details of an adapter, or of the base.

        Raises:
            ArgumentsError: the pool has none of that name.
        """
        with self._lock:
            if (adapter := self._find(name)) is not None:
                return adapter.details()
            path = Path(getattr(self.model.config, "_name_or_path", ""))
            return AdapterDetails(BASE, "none", {}, 0, 0, path, True, None, "none")

    def modules(self, name: str) -> dict[str, Any]:
        """Return an adapter's modules by the path of their host below the decoder stack; of the base there are none."""
        with self._lock:
            return dict(adapter.modules) if (adapter := self._find(name)) is not None else {}

    def remove(self) -> None:
        """Give the model back as it was, to the bit.

        Raises:
            SteeringError: generations are running on it.
        """
        with self._lock:
            busy = sum(adapter.users for adapter in (*self._adapters.values(), *self._retired))
            if busy:
                raise SteeringError(f"{busy} adapters of this pool are in use; let the generations end first.")
            for adapter in self._adapters.values():
                self._retire(adapter)
            self._adapters.clear()
            self.release()
            if self._features is not None:
                self._features.release()
            if self._original is not None:
                self._original.put_back()

    def config_of(self, name: str) -> Any:
        """Return the model's config for prompts and images of an adapter, or the base's own for `BASE`."""
        return self._original.config() if self._original is not None and name == BASE else self.model.config

    def _base(self) -> PreTrainedModel | None:
        return self._original.model() if self._original is not None else None

    def check(self, names: str | Sequence[str]) -> None:
        """Check names that rows are to give: ArgumentsError if one is unknown."""
        with self._lock:
            for name in [names] if isinstance(names, str) else names:
                self._find(name)

    def _hook(self, path: str) -> RemovableHandle:
        if path == PROJECTOR and self._projector is not None:
            return self._projector.register_forward_hook(project_by_row(self._projector))
        return self.stack.get_submodule(path).register_forward_hook(dispatch(path), with_kwargs=True)

    def _retire(self, adapter: PooledAdapter) -> None:
        """Take an adapter out; its hooks go when the last generation that uses it ends."""
        self._residency.forget(adapter)
        if adapter.users:
            self._retired.add(adapter)
        else:
            self._hooks.release(adapter.hosts())

    def _find(self, name: object) -> PooledAdapter | None:
        if name == BASE:
            return None
        if isinstance(name, str) and name in self._adapters:
            return self._adapters[name]
        hint = nearest(str(name), self._adapters)
        raise ArgumentsError(f"unknown adapter {name!r}: {hint}Known: {', '.join([BASE, *self._adapters])}")

    def _acquire(self, names: str | Sequence[str]) -> list[PooledAdapter | None]:
        with self._lock:
            adapters = [self._find(name) for name in ([names] if isinstance(names, str) else names)]
            self._residency.enter({adapter for adapter in adapters if adapter is not None})
            return adapters

    def _give_back(self, adapters: list[PooledAdapter | None]) -> None:
        with self._lock:
            used = {adapter for adapter in adapters if adapter is not None}
            self._residency.leave(used)
            for adapter in used & self._retired:
                if not adapter.users:
                    self._retired.remove(adapter)
                    self._hooks.release(adapter.hosts())

    @contextmanager
    def _opened(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, generating: bool) -> Iterator[Scope]:
        given = kwargs.pop("adapter_names", None)
        if given is None:
            around = current()
            given = around.names.get(id(self), BASE) if around is not None else BASE
        names = row_names.listed(given)
        if not isinstance(names, str):
            row_names.check_count(names, args, kwargs)
        adapters = self._acquire(names)
        try:
            with super()._opened(args, kwargs, generating=generating) as scope:
                scope.rows = rows = ServedRows(adapters)
                if not rows.active:
                    scope.disabled |= {id(self)}
                rows.note_ids(args, kwargs)
                if self._features is not None and self._with_image_parts() is not None:
                    refuse_ready_made(kwargs)
                if self._original is not None:
                    self._original.check_ids(args, kwargs) if id(self) in scope.disabled else row_names.check_alone(
                        names
                    )
                yield scope
        finally:
            self._give_back(adapters)

    def _begin(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(scope.rows, ServedRows):
            scope.rows.note_ids(args, kwargs)
        super()._begin(scope, args, kwargs)

    def _run(self, scope: Scope, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return row_by_row.run(scope, args, kwargs, partial(super()._run, scope, original, args))

    def _with_image_parts(self) -> ServedRows | None:
        """Return the rows of the present call, if an adapter of theirs has image parts of its own."""
        scope = current()
        if scope is None or scope.owner is not self or id(self) in scope.disabled:
            return None
        rows = scope.rows if isinstance(scope.rows, ServedRows) else None
        return rows if rows is not None and (rows.brings_projectors or rows.brings_newlines) else None

    def _rows_of(self, scope: Scope) -> int | None:
        return scope.rows.count if isinstance(scope.rows, ServedRows) else None

    def _named(self, scope: Scope, rows: list[int]) -> str:
        return scope.rows.named(rows) if isinstance(scope.rows, ServedRows) else super()._named(scope, rows)

    def _enter_pass(self, scope: Scope, this_pass: ForwardPass) -> None:
        if scope.rows is not None:
            scope.groups = scope.rows.groups(this_pass)
        elif id(self) in scope.names:
            raise TokenMapError(
                f"{type(self.stack).__name__} was called on its own, so the pool cannot tell which adapters its rows "
                "have. Call the whole model."
            )

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scope = current()
        if scope is not None and scope.owner is not self and id(self) in scope.names:
            # On its own in a block of `use_adapter`, to get embeddings: they are those of the named adapters.
            with self._opened(args, kwargs, generating=False):
                return self._prepare(original, *args, **kwargs)
        if scope is not None and scope.owner is self and isinstance(scope.rows, ServedRows):
            if scope.rows.brings_projectors and id(self) not in scope.disabled:
                scope.rows.assign_images(original, *args, **kwargs)
            if self._newline is not None and scope.rows.brings_newlines and id(self) not in scope.disabled:
                splice = self._method_of(marking(self.model, self._newline), "prepare_inputs_labels_for_multimodal")
                *parts, embeds, labels = super()._prepare(splice, *args, **kwargs)
                if embeds is not None:
                    base = self.model.get_parameter(self._newline)
                    embeds = with_newlines(embeds, base, scope.rows.pooled)
                return *parts, embeds, labels
        return super()._prepare(original, *args, **kwargs)
