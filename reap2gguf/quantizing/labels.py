"""How programs find a GGUF file by its quant label, and whether they find the right one.

Two programs parse the names of the files in a repository, each by a rule of its own:

- llama.cpp (`llama-server -hf OWNER/NAME:TAG`, `find_best_model` in common/download.cpp): the first
  model file, in the order of the listing, whose path holds TAG and then `.` or `-`, in any case.
  TAG may begin in the middle of a word: Q4_K_M finds NAME-IQ4_K_M.gguf.
- the Hub (its list of quantizations, "Use this model", and with it `ollama run hf.co/...:TAG`;
  packages/tasks/src/gguf.ts of huggingface.js): the last name of a known file type in the path,
  with the `_` and capitals after it. NAME-IQ4_K_M.gguf is a Q4_K_M, as IQ4_K is not a known type.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from reap2gguf.errors import RecipeError, UsageError
from reap2gguf.gguf_files.part_names import parse_part_name

# what a path holds if llama.cpp does not take the file for a model
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
# The Hub tries these in this order at each letter: by the number of the file type, then the names
# that only publishers use.
_HUB_TYPES = """
    F32 F16 Q4_0 Q4_1 Q4_1_SOME_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M
    Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M
    IQ4_XS IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0 Q2_K_XL
    Q3_K_XL Q4_K_XL Q5_K_XL Q6_K_XL Q8_K_XL
"""
_HUB_LABEL = re.compile(rf"(?:UD-)?(?:{'|'.join(_HUB_TYPES.split())})(?:_[A-Z]+)?", re.ASCII)
_OTHER_ENDINGS = ("MIX", "MIXED", "CUSTOM", "OWN")  # for labels that both rules tell apart


IK_LABEL = "ik-"  # begins the labels of files that only ik_llama.cpp loads
_PART_NUMBER = re.compile(r"(?:.*-)?\d+-of-\d+", re.ASCII)


def label_fault(label: str) -> str | None:
    """Why programs would take NAME-LABEL.gguf for another kind of file; None if they do not."""
    if _PART_NUMBER.fullmatch(label):
        return "ends like the number of a part of a split file"
    small = f"{label}.gguf".lower()
    if word := next((word for word in _NOT_MODELS if word in small), None):
        return f"holds {word!r}, by which llama.cpp knows files that are no models"
    if small.count(".gguf") > 1:
        return "holds the ending '.gguf', which the program adds"
    return None


def check_ik_label(label: str, is_ik: bool, where: str) -> None:
    """Raise RecipeError unless a file's name says whether only ik_llama.cpp loads it."""
    if label.startswith(IK_LABEL) is is_ik:
        return
    if is_ik:
        raise RecipeError(
            f"{where}: label {label!r} does not say that only ik_llama.cpp loads such a file; let "
            f"it begin with {IK_LABEL!r}"
        )
    raise RecipeError(
        f"{where}: label {label!r} begins with {IK_LABEL!r}, as of files that only ik_llama.cpp "
        "loads; choose another"
    )


def twice(labels: Sequence[str]) -> tuple[str, str] | None:
    """Two labels that are the same, or differ in capitals alone; None if there are none."""
    seen: dict[str, str] = {}
    for label in labels:
        if (first := seen.setdefault(label.lower(), label)) != label or labels.count(label) > 1:
            return first, label
    return None


def refuse_twice(labels: Sequence[str]) -> None:
    """Raise UsageError for two files of one name."""
    if same := twice(labels):
        both = " and ".join(map(repr, dict.fromkeys(same)))
        raise UsageError(
            f"two recipes have the label {both} and so the same file name (where capitals do "
            "not count, as on macOS); give one of them another with --label RECIPE=LABEL"
        )


def llama_cpp_finds(files: Iterable[str], tag: str) -> str | None:
    """The file of a repository that llama.cpp opens for `-hf REPO:TAG`; None if it finds none."""
    pattern = _llama_cpp_pattern(tag)
    for name in sorted(files):
        part = parse_part_name(name)
        is_first = part is None or part.count == 1 or part.number == 0
        if _is_model(name) and pattern.search(name) and is_first:
            return name
    return None


def _llama_cpp_pattern(tag: str) -> re.Pattern[str]:
    # llama.cpp takes the tag for a regular expression; of the characters of a label, only the dot
    # means something there
    return re.compile(re.escape(tag).replace(r"\.", ".") + "[.-]", re.IGNORECASE | re.ASCII)


def _is_model(name: str) -> bool:
    return name.endswith(".gguf") and not any(word in name for word in _NOT_MODELS)


def hub_label(name: str) -> str | None:
    """The quantization that the Hub reads from a file's name; None if it sees none."""
    found = _HUB_LABEL.findall(name.upper())
    return found[-1] if found else None


@dataclass(frozen=True)
class LabelledFile:
    """A model file NAME-LABEL.gguf, its first part if it has several, and its recipe."""

    name: str
    label: str
    recipe: str

    @property
    def stem(self) -> str:
        """The name without its number as a part and without .gguf."""
        part = parse_part_name(self.name)
        return part.stem if part else self.name.removesuffix(".gguf")

    @property
    def beginning(self) -> str:
        """What stands before the label: NAME and a hyphen."""
        return self.stem.removesuffix(self.label)


@dataclass(frozen=True)
class Tags:
    """What finds one file in its repository."""

    llama_cpp: str  # after `-hf REPO:`; "" if nothing finds it
    hub: str  # after `hf.co/REPO:`; the whole file name always works there


def tags_of(files: Sequence[LabelledFile]) -> dict[str, Tags]:
    """For each file, by its name, the shortest tags that find this file and no other."""
    names = [file.name for file in files]
    hub_labels = [hub_label(name) for name in names]
    found = {}
    for file in files:
        # NAME-LABEL is found wherever no longer name ends with it
        tags = (file.label, file.stem)
        tag = next((tag for tag in tags if llama_cpp_finds(names, tag) == file.name), "")
        label = hub_label(file.name)
        is_own = label == file.label.upper() and hub_labels.count(label) == 1
        found[file.name] = Tags(tag, file.label if is_own else file.name)
    return found


def label_warnings(files: Sequence[LabelledFile]) -> list[str]:
    """What is wrong with the labels of files in one repository, each with a way out."""
    names = [file.name for file in files]
    by_name = {file.name: file for file in files}
    warnings = []
    hidden: set[frozenset[str]] = set()  # pairs that were reported
    for file in files:
        if not _is_model(file.name):
            word = next((word for word in _NOT_MODELS if word in file.name), ".gguf")
            warnings.append(
                f"{file.name}: llama.cpp's -hf takes no file with {word!r} in its name for a "
                "model; pass another --name"
            )
            continue
        first = llama_cpp_finds(names, file.label)
        if first is not None and first != file.name:
            hidden.add(frozenset((first, file.name)))
            warnings.append(
                f"`llama-server -hf OWNER/NAME:{file.label}` opens {first}, and not {file.name}"
                f"{_also_on_the_hub(first, file.name)}; {_way_out(by_name[first], files)}"
            )
    for label, same in _by_hub_label(files).items():
        odd = [file for file in same if file.label.upper() != label] or list(same[1:])
        if len(same) > 1 and frozenset(file.name for file in same) not in hidden:
            both = " and ".join(file.name for file in same)
            warnings.append(
                f"the Hub and `ollama run hf.co/...` see {both} as one quantization, {label}; "
                f"{_way_out(odd[0], files)}"
            )
    return warnings


def _also_on_the_hub(one: str, other: str) -> str:
    label = hub_label(one)
    is_same = label is not None and label == hub_label(other)
    return f" (the Hub and Ollama see both as {label})" if is_same else ""


def hub_note(label: str) -> str | None:
    """What to know of a label that the Hub reads as another one."""
    seen = hub_label(f"NAME-{label}.gguf")
    if seen in (None, label.upper()):
        return None
    return f"the Hub shows files with the label {label} as {seen}"


def _by_hub_label(files: Sequence[LabelledFile]) -> Mapping[str, list[LabelledFile]]:
    found: dict[str, list[LabelledFile]] = {}
    for file in files:
        if (label := hub_label(file.name)) is not None:
            found.setdefault(label, []).append(file)
    return found


def _way_out(file: LabelledFile, files: Sequence[LabelledFile]) -> str:
    """Advice to give a file another label."""
    others = [other for other in files if other is not file]
    label = _free_label(file, others)
    if label is None:
        return "pass another --name, which holds no quant type"
    return f"build with --label {file.recipe}={label} to tell them apart"


def _free_label(file: LabelledFile, others: Sequence[LabelledFile]) -> str | None:
    """A label that both rules tell apart from the others'."""
    base = hub_label(f"NAME-{file.label}.gguf") or file.label
    for ending in _OTHER_ENDINGS:
        label = f"{base.rpartition('-')[2]}_{ending}"
        new = LabelledFile(f"{file.beginning}{label}.gguf", label, file.recipe)
        if _tells_apart(new, others):
            return label
    return None


def _tells_apart(new: LabelledFile, others: Collection[LabelledFile]) -> bool:
    files = [new, *others]
    names = [file.name for file in files]
    labels = [hub_label(file.name) for file in files]
    found = all(llama_cpp_finds(names, file.label) == file.name for file in (new, *others))
    return found and labels.count(labels[0]) == 1
