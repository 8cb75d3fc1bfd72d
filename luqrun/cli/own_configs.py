"""YAML files of one's own, in --config-dir or hydra.searchpath: none that Hydra would pass over in silence, and for a
mistake in one its file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra.conf
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from luqrun.cli.messages import dotted_keys, one_line, unknown_key
from luqrun.config import Config, conf_dir
from luqrun.errors import UserError
from luqrun.internals.of_hydra import args_parser, read_when_raised

SCANNED = re.compile("scanning a|flow")  # what PyYAML was in the middle of, where the mistake is at its beginning
PACKAGE = "# @package _global_"
SPACED = "a setting is written key: value, with a space after the colon"
MARK = "\ufeff"  # a byte order mark, before which Hydra finds no PACKAGE


def own_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders that a command line adds to Hydra's search path, in its order."""
    options, _ = args_parser().parse_known_args(arguments)
    folders = [options.config_dir] if options.config_dir else []
    for text in options.overrides:
        if text.lstrip("+").startswith("hydra.searchpath="):
            try:
                found = OverridesParser.create().parse_override(text).value()
            except HydraException:
                continue  # which Hydra will say
            folders += [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
    return [Path(each.removeprefix("file://")) for each in folders if not re.match(r"(pkg|structured):", each)]


def refuse_shadowed(arguments: Sequence[str]) -> None:
    """Raise UserError for a file of one's own with the name of a shipped one, which comes first in Hydra's search."""
    folders = own_folders(arguments)
    for shipped in (conf_dir(), Path(hydra.conf.__file__).parent) if folders else ():
        for path in sorted(shipped.rglob("*.yaml")):
            name = path.relative_to(shipped)
            for own in [folder / name for folder in folders]:
                if own.is_file() and not own.samefile(path):
                    choice = f"{name.parent}=my_{name.stem}" if name.parent.name else f"--config-name my_{name.stem}"
                    raise UserError(
                        f"{own} has the name of the shipped {path}, which would be used in its place: rename it to "
                        f"my_{name.name}, say, and choose it with {choice}"
                    )


def refuse_empty(config: DictConfig, arguments: Sequence[str]) -> None:
    """Raise UserError where an option that was chosen is a file of one's own without a setting in it."""
    folders = own_folders(arguments)
    for group, option in config.hydra.runtime.choices.items():
        path = _find(f"{group.partition('@')[0]}/{option}", folders)
        if path is not None and not _settings(path):
            raise UserError(f"{path} is empty, so that {group}={option} would change nothing")


def located(error: Exception, arguments: Sequence[str]) -> Exception:
    """The error as a UserError with file, line and key, where a file of one's own is the reason; else as it is."""
    if isinstance(error, UserError):  # of a command line, say, that cannot be parsed
        return error
    if not (folders := own_folders(arguments)):
        return error
    path = _being_read(error, folders)
    if path is not None:
        return UserError(f"{path}{_cannot_be_read(error, path)}")
    text = str(error)
    found = re.match(r"(?:In|Invalid defaults list in) '?([^\s':,]+)'?[:,] ?", text)
    path = _find(found[1], folders) if found else None
    if path is None:
        return _by_another_file(error, arguments, folders)
    text = text[found.end() :]
    if "while composing config" in text:
        return UserError(_composing(text, path))
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        line = _line_with(path, rf"\b{re.escape(missing[1].rpartition('/')[2])}\b")
        known = "Available options" in text
        what = one_line(type(error)(text)) if known else f"defaults name {missing[1]}, which is not there"
        return UserError(f"{path}{line}: {what}")
    if missing := re.match(r"Could not override '(?:.*[/@])?([^'/@]+)'", text):
        absolute = "" if "@" not in text else f"; a group of the whole is written with a slash: override /{missing[1]}"
        line = _line_with(path, rf"override\s+/?{re.escape(missing[1])}\b")
        return UserError(f"{path}{line}: defaults override {missing[1]}, which has no option here{absolute}")
    return UserError(f"{path}{_line_with(path, '^defaults')}: {' '.join(text.split())}")


def _by_another_file(error: Exception, arguments: Sequence[str], folders: Sequence[Path]) -> Exception:
    """For an option that is missing, or one too many: a file of one's own that the command chose may ask for it."""
    if missing := re.search(r"Could not find '(.+)/([^'/]+)'", str(error)):
        group, option = missing.groups()
        for folder in folders:
            if (folder / group / f"{option}.yml").is_file():
                return UserError(f"{folder / group / option}.yml must be called {option}.yaml to be found")
        pattern = rf"\b{re.escape(group)}(@\S+)?\s*:\s*['\"]?{re.escape(option)}\b"
    elif twice := re.match(r"(\S+) appears more than once", str(error)):
        pattern = rf"^\s*-\s*/?{re.escape(twice[1])}\s*:"
    else:
        return error
    for argument in arguments:
        group, _, option = argument.lstrip("+").partition("=")
        path = _find(f"{group.partition('@')[0]}/{option}", folders)
        line = _line_with(path, pattern) if path else ""
        if line:
            return UserError(f"{path}{line}: {one_line(error)}")
    return error


@contextmanager
def naming_files(config: DictConfig, arguments: Sequence[str]) -> Iterator[None]:
    """A UserError raised in here that begins with a key also says where a file of one's own sets it, if one does."""
    try:
        yield
    except UserError as error:
        key = re.match(r"(?:not set: )?([a-z_]+(?:\.[a-z_]+)*)(?=[=:,]|$| )", str(error))
        given = [text.lstrip("+~").partition("=")[0] for text in OmegaConf.to_container(config.hydra.overrides.task)]
        folders = own_folders(arguments) if key is not None and key[1] not in given else []
        for group, option in config.hydra.runtime.choices.items() if folders else ():
            path = _find(f"{group.partition('@')[0]}/{option}", folders)
            line = path and _line_of(path, key[1])
            if line or (path and str(error).startswith("not set") and group == key[1].partition(".")[0]):
                raise UserError(f"{error} (in {path}{line or ''})") from None
        raise


def _find(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of a config's name, such as schedule/mine, where it is one of one's own."""
    name = name if name.endswith(".yaml") else f"{name}.yaml"
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _being_read(error: Exception, folders: Sequence[Path]) -> Path | None:
    """The file of one's own that was being read when the error was raised."""
    path, name = read_when_raised(error)
    if name is not None:
        return _find(name, folders)
    for folder in folders if path is not None else ():  # as it was given
        if path.is_relative_to(folder.resolve()):
            return folder / path.relative_to(folder.resolve())
    return None


def _cannot_be_read(error: Exception, path: Path) -> str:
    """Where and why."""
    if isinstance(error, UnicodeDecodeError):
        data = path.read_bytes()
        try:
            data.decode()
        except UnicodeDecodeError as found:
            line = data.count(b"\n", 0, found.start) + 1
            return f", line {line}: byte 0x{data[found.start]:02x} is not UTF-8: save the file in that encoding"
    if isinstance(error, yaml.reader.ReaderError):
        line = _text(path).count("\n", 0, error.position) + 1
        return f", line {line}: YAML does not allow the character {chr(error.character)!r}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        begun = error.context_mark is not None and SCANNED.search(error.context or "")
        mark = error.context_mark if begun else error.problem_mark
        what = f"{error.context}: {error.problem}" if begun else str(error.problem)
        advice = ""
        if "\\t" in what:
            advice = "; YAML indents with spaces, not with tabs"
        elif "expected ':'" in what:
            advice = f"; {SPACED}"
        elif "mapping values are not allowed" in what:
            advice = "; the settings of one part begin in the same column, and a value with ': ' stands in quotes"
        return f", line {mark.line + 1}: {' '.join(what.split())}{advice}"
    if "Invalid loaded object type" in str(error):
        return ": it must hold settings, a line each: key: value"
    error = error if str(error) or error.__cause__ is None else error.__cause__
    if isinstance(error, OmegaConfBaseException):
        key = str(getattr(error, "full_key", None) or "")
        return f"{_line_of(path, key)}: {key}{': ' if key else ''}{str(error).splitlines()[0]}"
    if "header" in str(error) or "components" in str(error):
        return f", line 1: {error}; a line that begins with # @ is Hydra's, such as {PACKAGE}"
    return f"{_line_with(path, '^defaults') if 'defaults' in str(error) else ''}: {' '.join(str(error).split())}"


def _composing(text: str, path: Path) -> str:
    """What Hydra says of a file that does not fit the schema: a head line, the reason, and lines of name: value."""
    if not _settings(path):
        return f"{path} is empty"
    lines = [line for line in text.splitlines() if line.strip()]
    reason = lines[1].strip() if len(lines) > 1 else lines[0]
    key = next((found[1] for line in lines if (found := re.match(r"\s+full_key: (\S+)", line))), "")
    line = _line_of(path, key)
    if unknown := re.match(r"Key '([^']+)' (?:is )?not in", reason):
        key = key or unknown[1]
        if ":" in key:
            line = line or _line_with(path, rf"^\s*{re.escape(unknown[1])}")
            return f"{path}{line}: {unknown[1]} is no setting; {SPACED}"
        if _text(path).startswith(MARK):
            return f"{path}, line 1: the file begins with a byte order mark: save it as UTF-8 without one"
        if key.partition(".")[0] == path.parent.name and key.partition(".")[0] not in Config.__dataclass_fields__:
            return f"{path}, line 1: the file must begin with the line {PACKAGE}"
        return f"{path}{line}: {unknown_key(key)}"
    if "is not a ListConfig" in reason:
        reason = "must be a list, such as [first,last]"
    elif re.search("is not a subclass of|Cannot merge DictConfig with ListConfig", reason):
        reason = "must hold settings, a line each: key: value"
        key, line = (key, line) if key else _first_not_a_part(path)
        if (conf_dir() / key).is_dir() and key:
            reason += f", or an option is chosen in defaults: - override /{key}: OPTION"
    return f"{path}{line}: {f'{key}: ' if key else ''}{reason}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _settings(path: Path) -> bool:
    """Whether there is anything but comments."""
    try:
        return yaml.compose(_text(path), yaml.SafeLoader) is not None
    except (OSError, ValueError, yaml.YAMLError):
        return True  # it is not empty


def _line_of(path: Path, key: str) -> str:
    """', line 3', where the file sets the dotted key or the end of it; '' where it does not."""
    parts = key.split(".") if key else []
    try:
        root = yaml.compose(_text(path), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    for begin in range(len(parts)):
        node, line = root, None
        for part in parts[begin:]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = next((pair for pair in pairs if pair[0].value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        else:
            return f", line {line}"
    return ""


def _first_not_a_part(path: Path) -> tuple[str, str]:
    """(dotted key, ', line 3') of the first list or single value in the place of a part of the schema, or of the whole
    file; ('', '') where there is none."""
    parts = {name.rpartition(".")[0] for name in dotted_keys(Config)}
    root = yaml.compose(_text(path), yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return "", f", line {root.start_mark.line + 1}"
    for key, value in root.value:
        for name in (key.value, f"{path.parent.name}.{key.value}"):
            if name in parts and not isinstance(value, yaml.MappingNode) and not value.tag.endswith(":null"):
                return name, f", line {key.start_mark.line + 1}"
    return "", ""


def _line_with(path: Path, pattern: str) -> str:
    """', line 3', the first that fits; '' where none does."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if re.search(pattern, line.partition("#")[0]):
            return f", line {number}"
    return ""
