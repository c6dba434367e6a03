"""What is done to each sample of an elastic stream: webdataset's decoders, and the user's function."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from uniemox_dist.core.errors import UserError, missing_extra
from uniemox_dist.core.files import hide_secrets
from uniemox_dist.core.formatting import cut
from uniemox_dist.data.reader import DamagedSample

log = logging.getLogger("uniemox")
PICKLES = frozenset({"pkl", "pickle", "pyd", "pth"})
"""Extensions of members that webdataset's decoders unpickle."""
Handler = str | Callable[..., Any]
"""A name of webdataset's image handlers (`pil`, `rgb8`, `torchrgb`, …), or a function of key and bytes."""


def make_transform(
    decode: Handler | Sequence[Handler] | None, transform: Callable[[Any], Any] | None
) -> Callable[[Any], Any] | None:
    """Makes one function of both; None if there is nothing to do.

    Raises:
        UserError: if webdataset is not installed, or has no handler of that name.
    """
    if transform is not None and not callable(transform):
        raise UserError(f"transform={transform!r}: is not a function of a sample")
    if decode is None:
        return None if transform is None else _UserFunction(transform)
    handlers = [decode] if isinstance(decode, str) or not isinstance(decode, Iterable) else list(decode)
    for handler in handlers:
        if not isinstance(handler, str) and not callable(handler):
            raise UserError(
                f"decode={handler!r}: is neither the name of a handler of webdataset, such as 'pil', nor a function of "
                "key and bytes"
            )
    decoder = _Decoder(handlers)
    return decoder if transform is None else _Both(decoder, _UserFunction(transform))


class _Decoder:
    """`wds.decode(…)` for one sample."""

    def __init__(self, handlers: Sequence[Handler]) -> None:
        self._handlers = handlers
        self._decode = self._make()

    def __getstate__(self) -> dict[str, Any]:
        return {"_handlers": self._handlers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_handlers"])  # type: ignore[misc]

    def _make(self) -> Callable[[Any], Any]:
        try:
            from webdataset import autodecode
        except ImportError:
            raise missing_extra("webdataset", "stream") from None
        found = []
        for handler in self._handlers:
            try:
                found.append(autodecode.imagehandler(handler) if isinstance(handler, str) else handler)
            except (AssertionError, KeyError, ValueError):
                names = ", ".join(sorted(autodecode.imagespecs))
                raise UserError(f"decode={handler!r}: is not a handler of webdataset ({names})") from None
        decode: Callable[[Any], Any] = autodecode.Decoder([*found, _refuse_pickles])
        return decode

    def __call__(self, sample: Any) -> Any:
        from webdataset.autodecode import DecodingError

        try:
            return self._decode(sample)
        except DecodingError as error:
            cause = error.__cause__
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, ImportError):  # a package is missing, not a sample damaged
                raise UserError(f"decode: {cause}; install the package that decodes .{error.k}") from None
            why = str(cause).splitlines()[0][:200] if str(cause) else type(cause).__name__
            raise DamagedSample(f"{name_sample(sample)}: its .{error.k} cannot be decoded ({why})") from None


def _refuse_pickles(key: str, data: bytes) -> None:
    """A handler that comes after the user's and before webdataset's own, which would unpickle: whoever made a tar could
    run code."""
    if key.rpartition(".")[2] in PICKLES:
        raise UserError(
            f"decode: a member {key} holds a pickle, which can run code of whoever made the tar; give a handler for it "
            "in `decode` if you trust its maker"
        )


class _UserFunction:
    """The user's function, whose errors name the sample."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, sample: Any) -> Any:
        try:
            return self.function(sample)
        except DamagedSample as error:
            raise DamagedSample(f"{name_sample(sample)}: {error}") from None
        except KeyError as error:
            name = error.args[0] if error.args else None
            if isinstance(name, str) and isinstance(sample, Mapping) and name not in sample:
                members = ", ".join(key for key in sample if not key.startswith("__")) or "none"
                inner = [f"its {key}" for key, value in sample.items() if isinstance(value, Mapping)]
                nor = f", nor has {' or '.join(inner)} such an entry" if inner else ""
                raise UserError(
                    f"{name_sample(sample)}: has no member {name!r}, which `transform` wants{nor}; it has: {members}. "
                    "Let `transform` do without it, or raise DamagedSample there to replace such samples"
                ) from None
            log.error("transform failed at %s", name_sample(sample))
            raise
        except Exception:
            log.error("transform failed at %s", name_sample(sample))
            raise


class _Both:
    def __init__(self, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> None:
        self.first, self.second = first, second

    def __call__(self, sample: Any) -> Any:
        return self.second(self.first(sample))


def name_sample(sample: Any) -> str:
    """The tar and key of a sample in webdataset's form."""
    if isinstance(sample, Mapping) and "__key__" in sample:
        where = hide_secrets(str(sample.get("__url__", "")))
        return f"{where}: {cut(str(sample['__key__']))}".removeprefix(": ")
    return type(sample).__name__
