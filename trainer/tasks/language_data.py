"""Where a language model's tokens come from, and in what order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain

from launch.spec import ConfigError, build, closest, require
from launch.spec.data_fields import MIXTURE
from trainer.import_path import import_path

_FIELD = "config.data"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from.

    Attributes:
      kind: `bytes` of any text files, or `array_record` files of token arrays.
      path: a file, a directory or several of them; for `array_record` also globs.
      seq_len: tokens to predict per example.
      packing: rows hold whole documents, side by side, and a token attends to its own document
        alone: files of text, or records of any length. Without it, text is cut into rows wherever
        they end, and records are rows.
      keep: `package.module:function` of a filter, {'tokens': [n]} -> bool, called with each row, or
        with each document where they are packed; "" for all.
      mixture: name -> `path`, `weight` and any other of these fields (but seq_len, packing and
        mixture) in which the source is unlike the section; `path` is then left out here.
      pattern: `bytes`: which file names in a directory to read.
      exclude: `bytes`: names of directories to leave out.
      eval_every: `bytes`: one block of text (one document, where they are packed) in how many is
        held out for evaluation; 0 for none.
      eval_path: `array_record`: the held-out files; "" for none.
      dtype: `array_record`: of a token in the file.
    """

    kind: str
    seq_len: int
    path: Any = ""
    packing: bool = False
    keep: str = ""
    mixture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pattern: str = "*"
    exclude: tuple[str, ...] = ()
    eval_every: int = 50
    eval_path: Any = ""
    dtype: str = "uint16"

    def __post_init__(self) -> None:
        kinds = ("bytes", "array_record")
        require(self.kind in kinds, "kind", self.kind, closest(self.kind, kinds))
        require(self.seq_len >= 1, "seq_len", self.seq_len, "must be at least 1")
        for name in ("path", "eval_path"):
            paths = getattr(self, name)
            paths = (paths,) if isinstance(paths, str) else paths
            ok = isinstance(paths, tuple) and all(isinstance(path, str) for path in paths)
            require(ok, name, paths, "must be a path or a tuple of paths")
        if self.mixture:
            rule = f"each source of {MIXTURE} has its own; leave it out"
            require(not self.path, "path", self.path, rule)
        else:
            require(bool(self.path), "path", self.path, "empty; name a file or a directory")
        if self.keep:
            ok = self.keep.count(":") == 1
            require(ok, "keep", self.keep, "must be package.module:function")

    @property
    def token_dtype(self) -> str:
        """Of a token in an example."""
        return "uint8" if self.kind == "bytes" else self.dtype

    def sources(self) -> dict[str, DataConfig]:
        """The parts of a mixture, each as a section of its own; {"": itself} for no mixture.

        Raises:
          ConfigError: a source has a field that is no source's, or a wrong value.
        """
        if not self.mixture:
            return {"": self}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = {}
        for name, section in self.mixture.items():
            where = f"{_FIELD}.{MIXTURE}.{name}"
            if not isinstance(section, Mapping):
                raise ConfigError(where, "must be a section with path and weight", section)
            shared = [key for key in ("seq_len", "packing", "mixture") if key in section]
            if shared:
                rule = f"is the same for all sources; set {_FIELD}.{shared[0]}"
                raise ConfigError(f"{where}.{shared[0]}", rule, section[shared[0]])
            fields = {key: value for key, value in section.items() if key != "weight"}
            if fields.keys() - own.keys():
                odd = sorted(fields.keys() - own.keys())[0]
                hint = closest(odd, [*own, "weight"])
                raise ConfigError(f"{where}.{odd}", f"no such field; {hint}")
            found[name] = build(DataConfig, {**own, "mixture": {}, **fields}, where)
        return found

    def weights(self) -> dict[str, float]:
        """name -> weight.

        Raises:
          ConfigError: a source has none.
        """
        for name, section in self.mixture.items():
            if "weight" not in section:
                raise ConfigError(f"{_FIELD}.{MIXTURE}.{name}.weight", "missing; a share, as 0.5")
        return {name: section["weight"] for name, section in self.mixture.items()}


class LanguageData:
    """The datasets that a DataConfig stands for.

    Raises:
      ConfigError: a section that cannot be; no file is opened yet.
    """

    def __init__(self, config: DataConfig):
        self.config = config
        self.parts = config.sources()
        self.weights = config.weights()
        self._sources: dict[tuple[str, str], Any] = {}
        if config.mixture:
            from trainer.data.mixture import check_weights

            check_weights(self.weights, f"{_FIELD}.{MIXTURE}")
        types = {part.token_dtype for part in self.parts.values()}
        if len(types) > 1:
            rule = f"sources of tokens of {', '.join(sorted(types))}; all must have one dtype"
            raise ConfigError(f"{_FIELD}.{MIXTURE}", rule)
        self.dtype = types.pop()

    def train(self, seed: int) -> grain.MapDataset:
        """Shuffled anew every epoch, for ever; a mixture's sources each on their own."""
        from trainer.data.mixture import mixture, source_seed
        from trainer.data.sources import training_order

        if not self.config.mixture:
            return training_order(self.source("", "train"), seed)
        datasets = {
            name: training_order(self.source(name, "train"), source_seed(seed, name))
            for name in self.parts
        }
        return mixture(datasets, self.weights, f"{_FIELD}.{MIXTURE}")

    def held_out(self) -> grain.MapDataset | None:
        """Held-out rows in their own order, mixed by today's weights; None without any."""
        from trainer.data.mixture import mixture
        from trainer.data.sources import fixed_order

        found = {
            name: fixed_order(self.source(name, "eval"))
            for name, part in self.parts.items()
            if (part.eval_every if part.kind == "bytes" else part.eval_path)
            and self.weights.get(name, 1)
        }
        if not self.config.mixture or not found:
            return found.get("")
        return mixture(found, {name: self.weights[name] for name in found})

    def source(self, name: str, split: str) -> Any:
        """The rows of `train` or `eval` of one source; opened once."""
        if (name, split) not in self._sources:
            self._sources[name, split] = self._open(name, split)
        return self._sources[name, split]

    def _open(self, name: str, split: str) -> Any:
        from trainer.data import documents, records, sources
        from trainer.data.filtering import filtered
        from trainer.data.packing import packed

        part, field = self.parts[name], f"{_FIELD}.{MIXTURE}.{name}" if name else _FIELD
        path, length = ("path" if split == "train" else "eval_path"), part.seq_len
        source: Any
        if part.kind == "bytes" and part.packing:
            source = documents.ByteDocuments(self.corpus(name), split, part.eval_every)
        elif part.kind == "bytes":
            source = sources.ByteWindows(self.corpus(name), length, split, part.eval_every)
        elif part.packing:
            where = f"{field}.{path}"
            source = records.TokenDocuments(getattr(part, path), part.dtype, where)
        else:
            where = f"{field}.{path}"
            source = records.TokenRecords(getattr(part, path), length, part.dtype, where)
        if part.keep:
            keep = import_path(f"{field}.keep", part.keep, callable, "function")
            source = filtered(source, keep, f"{field}.keep")
        if part.packing:
            source = packed(source, length + 1, overlap=1, positions=False, field=field)
        return source

    @functools.cache  # noqa: B019 (there is one for the whole run)
    def corpus(self, name: str) -> Any:
        """The text of one source of `bytes`."""
        from trainer.data.sources import read_corpus

        part = self.parts[name]
        return read_corpus(part.path, part.pattern, part.exclude)

    def describe(self) -> str:
        """What there is, in a line for each source."""
        if not self.config.mixture:
            return f"data: {self._describe('')}"
        total = sum(self.weights.values())
        lines = [
            f"  {self.weights[name] / total:6.1%} {name}: {self._describe(name)}"
            for name in sorted(self.parts)
        ]
        return "\n".join(["data: a mixture of", *lines])

    def _describe(self, name: str) -> str:
        part, source = self.parts[name], self.source(name, "train")
        length, text = part.seq_len + 1, ""
        if part.kind == "bytes":
            corpus = self.corpus(name)
            skipped = f" ({corpus.num_skipped} unreadable)" if corpus.num_skipped else ""
            text = f"{len(corpus.data):,} bytes of text in {corpus.num_files:,} files{skipped}"
        if part.packing:
            short = f"; {source.num_dropped:,} too short" if source.num_dropped else ""
            packed = (
                f"{source.num_documents:,} documents in {len(source):,} rows of {length} tokens, "
                f"{source.efficiency:.1%} of which are no padding{short}"
            )
            return f"{text}; {packed}" if text else packed
        if not text or part.keep:
            dropped = getattr(source, "num_dropped", 0)
            rows = f"{len(source):,} rows of {length} tokens"
            rows += f" ({dropped:,} left out)" if dropped else ""
            text = f"{text}; {rows}" if text else rows
        return text
