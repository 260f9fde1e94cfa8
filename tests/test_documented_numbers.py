"""The tables of docs/results.md, docs/results and docs/fidelity.md against the JSON files that they cite."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from crossx.data.catalog import DATASETS
from crossx.recipes import PRESETS, list_recipes, load_recipe
from crossx.report.published import read_published

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
DETAILS = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/results").glob("*.md"))
}
FIDELITY = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?")
NOT_IN_A_FILE = ("GAP against GMP (95%)", "against `map`, paired")
"""Columns of paired differences between runs of two files, or of one without differences."""


def read(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def tables(text: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a page: rows of cells, the header first."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
        yield [header, *rows]


def leaves(value: Any) -> set[float]:
    """Return every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for item in value for number in leaves(item)}
    return {value} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def known(results: Any) -> dict[str, set[float]]:
    """Return what a file has on each variant, or on each run where it is a list of runs."""
    if isinstance(results, list):
        return {run["run"]: leaves(run) for run in results}
    found: dict[str, set[float]] = {}
    for row in [*results["rows"], *results.get("tuning", [])]:
        found[row["variant"]] = found.get(row["variant"], set()) | leaves(row)
    return found


def spellings(numbers: set[float]) -> set[str]:
    """Return shares as the tables print them, with the sign of a difference and without, and counts as they are."""
    return {f"{100 * number:{form}}" for number in numbers for form in (".2f", "+.2f")} | {
        f"{number:g}" for number in numbers
    }


def effect(difference: float, *interval: float) -> str:
    """Return how docs/fidelity.md prints a difference; without an interval, its beginning."""
    if not interval:
        return f"{100 * difference:+.2f} ("
    low, high = sorted(interval)
    return f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def key_of(header: list[str], row: list[str]) -> str | None:
    """Return the variant of a row, or its run."""
    found = re.fullmatch(r"`([^`]+)`(?:, .+)?", row[0])
    if found is None:
        return None
    return f"{found[1]}-{row[1]}" if header[1] == "seed" else found[1]


def sections() -> Iterator[Any]:
    """Yield the sections that cite a file: text and file."""
    for page in (RESULTS, *DETAILS.values()):
        for section in re.split(r"^##? ", page, flags=re.MULTILINE):
            # the file that a section is about comes last: others are named in passing
            cited = re.findall(r"\]\((?:\.\./)+results/(\w+)\.json\)", section)
            if cited:
                yield pytest.param(section, cited[-1], id=section.splitlines()[0])


def costs_of(variant: str, section: str) -> set[str]:
    """Return what the benchmarks that a section cites have on a method, as the table prints it."""
    printed = set()
    for name in re.findall(r"\((?:\.\./)+benchmarks/results/(methods\w*)\.json\)", section):
        digits = (1, 1) if name == "methods_448" else (2, 3)
        content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        cost = content["variants"][variant]
        printed |= {f"{cost['parameters'] / 1e6:.{digits[0]}f}", f"{cost['flops'] / 1e9:.{digits[1]}f}"}
        printed |= {
            f"{cost[kind]['ratio']['median']:.2f}" for kind in ("inference", "training step") if kind in cost
        }
    return printed


@pytest.mark.parametrize(("section", "file"), list(sections()))
def test_a_row_of_results_has_the_numbers_of_its_variant(section: str, file: str) -> None:
    of = known(read(file))
    seen = set()
    for header, *body in tables(section):
        for row in body:
            key = key_of(header, row)
            if key is None:
                continue
            seen.add(key)
            allowed = spellings(of[key]) | (costs_of(key, section) if "GFLOP" in header else set())
            for name, cell in zip(header[1:], row[1:], strict=True):
                if name not in NOT_IN_A_FILE:
                    printed = set(NUMBER.findall(re.sub("`[^`]*`", "", cell)))
                    assert printed <= allowed, (key, name)
    assert seen == set(of)


def test_the_effects_of_the_options_in_fidelity_are_those_of_the_files() -> None:
    losses, fig3, fig4 = (
        {row["variant"]: row for row in read(f"cub80_{name}")["rows"]} for name in ("losses", "fig3", "fig4")
    )

    def against_first(variant: str, sign: int = 1) -> str:
        found = losses[variant]["against"]
        return effect(sign * found["difference"], *(sign * bound for bound in found["intervals"]["images"]))

    def first_seed(variant: str) -> float:
        (value,) = [
            value
            for seed, value in zip(fig3[variant]["seeds"], fig3[variant]["values"], strict=True)
            if seed == 0
        ]
        return float(value)

    # where no file has an interval, the table marks the one that it prints
    expected = {
        "C3S (Eq. 4)": f"`released` {against_first('c3s-paper', -1)}",
        "its diagonal (Eq. 4)": f"1: {effect(losses['c3s-paper-diagonal-1']['top1'] - losses['c3s-paper']['top1'])}",
        "λ of C3S (Eq. 10)": f"all 0: {against_first('no-c3s')}",
        "λ of CL (Eq. 11)": f"both 0: {against_first('no-cl')}",
        "CL's teacher (Eq. 6)": f"true: {against_first('c3s-released-teacher-detached')}",
        "pooling of L-1": f"`avg`: {effect(fig4['c3s+gap+fp+cl']['top1'] - first_seed('c3s+gmp+fp+cl'))}",
        "Dogs": f"`use_merged` false: {effect(fig3['c3s+gmp+cl']['top1'] - fig3['c3s+gmp+fp+cl']['top1'])}",
    }
    header, *body = next(tables(FIDELITY))
    printed = {row[0]: row[header.index("accuracy")] for row in body}
    measured = {what: cell for what, cell in printed.items() if re.search(r"\d\.\d\d", cell)}
    assert measured.keys() == expected.keys()
    for what, cell in measured.items():
        assert cell.startswith(expected[what])
        assert ("\\*" in cell) == expected[what].endswith("(")
    without_merged = effect(fig4["c3s+gap+cl"]["top1"] - first_seed("c3s+gmp+cl"))
    assert f"without merged features {without_merged}" in measured["pooling of L-1"]


def test_the_order_of_the_methods_is_compared_with_the_papers() -> None:
    rows = read("cub80_methods_three_seeds")["rows"]
    ours = {row["variant"].replace("-", "_"): row["top1"] for row in rows}
    table = [row for row in read_published() if row.table == 4 and row.dataset == "cub"]
    # two trunks of plain and Cross-X: ResNet-50 is that of most methods
    published = {row.method: row.accuracy for row in table if row.backbone != "SENet-50"}
    common = sorted(published.keys() & ours.keys())
    rank = spearmanr([published[name] for name in common], [ours[name] for name in common]).statistic
    page = " ".join(RESULTS.split())
    assert f"of the published accuracies on CUB with these is {rank:.2f}" in page
    assert len(common) == 11
    assert "the eleven methods of Table 4" in page


def test_the_costs_of_the_recipes_on_resnet50_are_those_of_the_file() -> None:
    variants = json.loads((ROOT / "benchmarks/results/methods_448.json").read_text(encoding="utf-8"))[
        "variants"
    ]
    page = " ".join(DETAILS["sgd"].split())
    for recipe, words in (("mamc_cub_resnet50", " parameters and"), ("kernel_pooling_cub_resnet50", " and")):
        cost, said = variants[recipe], page[page.index(f"(`{recipe}`") :][:120]
        assert f"{cost['parameters'] / 1e6:.1f} M{words} {cost['flops'] / 1e9:.1f} GFLOP" in said


def test_few_images_table_is_that_of_the_file() -> None:
    """Each cell of "Few images per class", and the rows of README on `finetune`, against the benchmark's JSON."""
    results = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text(encoding="utf-8"))
    names = {"MobileNetV2 0.35": "mobilenetv2_035", "EfficientNet-Lite0": "tf_efficientnet_lite0"}
    section = RESULTS.partition("## Few images per class\n")[2].partition("\n## ")[0]
    header, *rows = next(tables(section))
    # "10 epochs", or "plain, 10 epochs" for another method than the recipe's
    columns = [re.fullmatch(r"(?:(\w+), )?(\d+) epochs", title) for title in header[3:]]
    kinds = [f"{column[2]}/0" + (f"/{column[1]}" if column[1] else "") for column in columns if column]
    measured = set()
    for backbone, images, probe, *cells in rows:
        key = f"{names[backbone]}/{images}"
        if key in results["probes"]:
            assert probe == f"{100 * results['probes'][key]['top1']:.2f}"
        for kind, cell in zip(kinds, cells, strict=True):
            found = results["cells"].get(f"{key}/{kind}")
            assert cell == (printed(found) if found else "not measured")
            measured |= {f"{key}/{kind}"} if found else set()
    assert measured == set(results["cells"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(
        r"^\| `finetune`, (\d+) images per class, (\w+) epochs +\| (.*?) +\| ([\d.]+) .*?\| ([\d.]+) +\| (.*?) +\|",
        readme,
        re.M,
    )
    assert quoted
    for images, count, backbone, probe, top1, difference in quoted:
        key = f"{names[backbone]}/{images}"
        found = results["cells"][f"{key}/{ {'five': 5, 'ten': 10}[count] }/0"]
        low, high = found["difference"][1:]
        assert probe == f"{100 * results['probes'][key]['top1']:.2f}"
        assert top1 == f"{100 * found['top1']:.2f}"
        assert difference == f"{100 * found['difference'][0]:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


@pytest.mark.parametrize(
    ("row", "section"),
    [
        ("`finetune`, 30 images per class, ten epochs, three seeds", "The compared methods"),
        (
            "`finetune_fast`, 30 images per class, five epochs, three seeds",
            "Three seeds on EfficientNet-Lite0",
        ),
    ],
)
def test_readme_compares_crossx_with_plain_as_the_results_do(row: str, section: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [(_, _, baseline, top1, difference)] = [
        cells for rows in tables(readme) for cells in rows if cells[0] == row
    ]
    part = RESULTS.partition(f"## {section}\n")[2].partition("\n## ")[0]
    header, *rows = next(tables(part))
    results = {cells[0]: dict(zip(header, cells, strict=True)) for cells in rows}
    column = "top-1 (95% over images)"
    assert baseline.split()[0] == results["`plain`"][column].split()[0]
    assert top1 == results["`crossx`"][column].split()[0]
    assert difference == results["`crossx`"]["against plain (95% over images)"].replace("**", "")


def test_the_choice_of_a_method_quotes_the_results() -> None:
    """Every cell of docs/which-method.md is that of the same variant and column in docs/results.md, or of its JSON."""
    page = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    section = RESULTS.partition("## The compared methods\n")[2].partition("\n## ")[0]
    header, *rows = next(tables(section))
    results = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    measured = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text(encoding="utf-8"))[
        "cells"
    ]
    _, (columns, *methods), (_, *images) = tables(page)
    assert len(methods) > 10
    for name, *cells in methods:
        expected = [results[name][column].replace("**", "") for column in columns[1:]]
        assert cells == expected, name
    assert [row[0] for row in methods] == [
        row["variant"] for row in sorted(results.values(), key=lambda row: row[columns[1]], reverse=True)
    ]  # fmt: skip
    for count, *cells in images:
        for cell, backbone in zip(cells, ("mobilenetv2_035", "tf_efficientnet_lite0"), strict=True):
            found = measured[f"{backbone}/{count}/10/0"]
            assert cell == f"{100 * found['top1']:.2f} ({100 * found['difference'][0]:+.2f})"


def test_the_licences_are_those_of_timm_and_of_the_catalog() -> None:
    timm = pytest.importorskip("timm")
    weights, datasets, _ = tables((ROOT / "docs" / "licences.md").read_text(encoding="utf-8"))
    stated = {row[0].strip("`"): row[1] for row in weights[1:]}
    assert stated == {name: timm.get_pretrained_cfg(name).license for name in stated}
    used = {load_recipe(name).get("model", "backbone") for name in list_recipes()}
    # the page says in words what timm does not state
    assert {name for name in used if name and "." in name} == {*stated, "alexnet.tv_in1k"}
    assert {row[0].strip("`"): row[1] for row in datasets[1:]} == {
        name: info.licence for name, info in DATASETS.items() if info.licence != "yours"
    }


def test_the_sizes_of_an_installation_are_those_of_the_file() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks/results/install_size.json").read_text(encoding="utf-8"))["pypi"]
    (_, *base), (_, *extras) = tables(page)
    assert [float(row[1].replace(",", "")) for row in base] == [
        round(measured[key]) for key in ("base", "base_cuda", "cuda_in_torch", "only_training")
    ]
    for name, _, size in extras:
        found = measured["extras"][name.strip("`")]
        assert not found["missing"]
        assert float(size.replace(",", "")) == round(found["adds"])


def printed(cell: dict[str, Any]) -> str:
    difference, low, high = (f"{100 * value:+.2f}" for value in cell["difference"])
    return f"{100 * cell['top1']:.2f} ({difference}; {low} to {high})"


def test_the_table_of_the_audit_is_that_of_the_file() -> None:
    runs = json.loads((ROOT / "benchmarks/results/audit.json").read_text(encoding="utf-8"))["runs"]
    expected = {
        # TITLE/BACKBONE/CLASSES/SEED, without a title for cub80
        (
            name.split("/")[0] if name.count("/") == 3 else "cub80",
            f"`{run['backbone']}`",
            str(run["classes"]),
        ): [
            f"{run[what][measure]:.2f}"
            for what in ("labels", "duplicates")
            for measure in ("precision", "recall")
        ]
        for name, run in runs.items()
    }
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    table = next(body for header, *body in tables(page) if "labels: precision" in header)
    assert {tuple(row[:3]): row[3:] for row in table} == expected
    whole = next(run["as_it_is"] for run in runs.values() if run["classes"] == 80)
    text = " ".join(page.split())
    assert f"the {whole['images']:,} images have {whole['copies']} pairs of near-duplicates" in text
    assert f"{whole['groups_across_splits']} of them across the official split" in text
    assert f"{whole['label_issues']} labels are listed" in text


def test_the_presets_are_those_of_the_benchmark() -> None:
    section = RESULTS.split("## Presets\n")[1].split("\n## ")[0]
    presets = json.loads((ROOT / "benchmarks" / "results" / "fast.json").read_text(encoding="utf-8"))[
        "presets"
    ]
    rows = [row for row in next(tables(section))[1:] if row[1] != "not measured"]
    assert len(rows) == len(presets) == 3
    for row, entry in zip(rows, presets, strict=True):
        options = dict(itertools.pairwise(entry["options"]))
        recipe = load_recipe(PRESETS[options["--preset"]])
        assert f"`{options['--preset']}`" in row[0]
        assert f"{options.get('--data.image_size', recipe.get('data', 'image_size'))} px" in row[0]
        found = entry["summary"]
        expected = [f"{100 * found['top1']:.2f}", f"{100 * found['ece']:.2f}"]
        assert row[1:] == [
            *expected,
            ", ".join(entry["runs"]),
            f"{found['wall_s']:.0f}",
            f"{found['cpu_s']:.0f}",
        ]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("## In two steps", "two_steps"),
        ("## In one training, from refined", "refined"),
        ("## In one training, with prototypes", "following"),
        ("## At 224 pixels", "following_drawn224"),
    ],
)
def test_the_tables_of_parts_and_accuracy_are_those_of_the_files(title: str, name: str) -> None:
    section = DETAILS["parts"].split(title)[1].split("\n## ")[0]
    accuracies, measures, *_ = tables(section)
    found = json.loads((ROOT / "results" / "parts" / f"{name}.json").read_text(encoding="utf-8"))
    networks = [name.strip("`") for name in accuracies[0][1:-1]]
    assert networks == list(found["summary"])
    for seed, *tops, printed in accuracies[1:]:
        of = found["summary"] if seed == "mean" else found["runs"][seed]
        gain = found["difference"] if seed == "mean" else of["difference"]
        assert tops == [f"{100 * of[name]['top1']:.2f}" for name in networks]
        ends = gain["interval_over_seeds" if seed == "mean" else "interval"]
        low, high = (f"{100 * end:+.2f}" for end in ends)
        assert printed.startswith(f"{100 * gain['value']:+.2f} ({low} to {high}")
    keys = [
        "correlation", "nmi_of_peaks_in_parts", "keypoint_nmi", "peak_in_part", "flip", "follows",
    ]  # fmt: skip
    assert len(measures) == 1 + 3 * len(networks)
    for name, *cells in measures[1:]:
        network, stage = name.split(", ")
        assert cells == [f"{found['summary'][network][stage][key]:.3f}" for key in keys]


def test_the_table_of_the_search_among_options_is_that_of_the_file() -> None:
    (printed,) = tables(DETAILS["parts"].split("## A search among the options")[1].split("\n## ")[0])
    found = json.loads((ROOT / "results" / "parts" / "options.json").read_text(encoding="utf-8"))
    rows = {f"`{row['variant']}`": row for row in found["rows"]}
    assert [row[0] for row in printed[1:]] == list(rows)
    for name, top1, gain, *cells in printed[1:]:
        row = rows[name]
        assert top1 == f"{100 * row['top1']:.2f}"
        against = row["against"]
        assert gain == (effect(against["difference"], *against["intervals"]["images"]) if against else "")
        assert cells == [
            f"{row[stage][key]:.3f}"
            for stage in ("previous", "last", "merged")
            for key in ("correlation", "nmi_of_peaks_in_parts", "peak_in_part")
        ]


def test_what_refined_prototypes_start_from_is_that_of_the_file() -> None:
    section = " ".join(
        DETAILS["parts"].split("## In one training, from refined")[1].split("\n## ")[0].split()
    )
    found = json.loads((ROOT / "results" / "parts" / "refined_start.json").read_text(encoding="utf-8"))
    refined, default = (found["summary"][name] for name in ("refined", "default"))
    gain = found["runs"]["0"]["difference"]
    low, high = (f"{100 * end:+.2f}" for end in gain["interval"])
    assert (
        f"NMI is {refined['previous']['nmi_of_peaks_in_parts']:.3f} and the peaks of the lower one are in parts in "
        f"{100 * refined['previous']['peak_in_part']:.1f}%, at a top-1 of {100 * refined['top1']:.2f} against "
        f"{100 * default['top1']:.2f}, {100 * gain['value']:+.2f} ({low} to {high})."
    ) in section


def named_score(score: str) -> str:
    """Return a score as docs/unknowns.md names it: those that are options of crossx are code."""
    if k := re.fullmatch(r"neighbors, k = (\d+)", score):
        return f"k = {k[1]} neighbour"
    parts = re.split("( and | or | times )", score)
    return "".join(f"`{part}`" if re.fullmatch("[a-z_]+", part) else part for part in parts)


def test_the_tables_of_rejection_and_sets_are_those_of_the_files() -> None:
    runs = {
        name: run
        for file in ("unknowns", "prediction_sets")
        for name, run in json.loads(
            (ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8")
        )["runs"].items()
    }
    scores, sets = [], []
    for name, run in runs.items():
        network = {"plain": "plain", "crossx": "Cross-X"}[name.partition("-")[0]]
        for score, found in run["scores"].items():
            if "near" in found:
                shown = [named_score(score)]
                for folder in ("near", "far"):
                    shown += [f"{100 * found[folder][measure]:.1f}" for measure in ("auroc", "fpr95", "oscr")]
                    shown.append(f"{100 * (1 - found['kept'][folder]):.1f}")
                scores.append([f"{network} ({100 * run['top1']:.2f})", *shown])
        where = f"{network}, {run['classes']} species, {run['sets']['calibration_images']} images"
        kinds = {"lac": "LAC", "lac_not_empty": "LAC, never empty (crossx)", "aps": "APS", "raps": "RAPS"}
        for kind, title in kinds.items():
            found = run["sets"][kind]
            shares = [f"{100 * found['coverage']:.2f}%"]
            shares += [f"{100 * found[share]:.1f}%" for share in ("single", "empty")]
            shares.append(f"{100 * found['worst_class']:.0f}%")
            mean, deviation = (100 * found[f"{of}_of_random_calibrations"] for of in ("mean", "deviation"))
            sizes = [f"{found['mean_size']:.2f}", str(found["largest"])]
            sets.append([where, title, *shares, *sizes, f"{mean:.2f}% ± {deviation:.2f}"])
    others = {}
    for file, folders in (
        ("unknown_choice", ("near", "insects")), ("unknown_photographs", ("flowers", "pets"))
    ):  # fmt: skip
        path = ROOT / "benchmarks" / "results" / f"{file}.json"
        for name, run in json.loads(path.read_text(encoding="utf-8"))["runs"].items():
            for score, found in run["scores"].items():
                row = [f"{100 * found['kept']['test']:.1f}"]
                for folder in folders:
                    row += [f"{100 * found[folder][measure]:.1f}" for measure in ("auroc", "fpr95")]
                    row.append(f"{100 * (1 - found['kept'][folder]):.1f}")
                others[name, named_score(score)] = row
    page = tables((ROOT / "docs" / "unknowns.md").read_text(encoding="utf-8"))
    shown_tables = {header[0]: body for header, *body in page}
    assert shown_tables["network"] == scores
    assert shown_tables["run"] == sets
    chosen = shown_tables["network of 35 species"]
    assert len(chosen) == 14
    for network, score, *row in chosen:
        assert row == others["plain-35" if network.startswith("plain") else "fast-35", score]
    photographs = {("fast-192", score): row for score, *row in shown_tables["score"]}
    assert photographs == {key: row for key, row in others.items() if key[0] == "fast-192"}


def test_the_table_of_the_price_of_rejection_is_that_of_the_file() -> None:
    path = ROOT / "benchmarks" / "results" / "unknowns.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "unknowns.md").read_text(encoding="utf-8")
    table = next(body for header, *body in tables(page) if header[0] == "unknown images")
    folders = {
        "other species": "near", "drawn birds": "far", "flowers": "flowers", "cats and dogs": "pets"
    }  # fmt: skip
    names = {"plain": "plain-50-0", "Cross-X": "crossx-50-0"}
    assert len(table) == 10
    for images, network, score, *shares in table:
        found = runs[names[network]]["scores"][score.strip("`")][folders[images]]["rejected"]
        assert shares == [f"{100 * found[keep]:.1f}" for keep in ("0.98", "0.95", "0.9", "0.8")]


def test_the_table_of_rejection_by_exported_files_is_that_of_the_file() -> None:
    path = ROOT / "benchmarks" / "results" / "exported_rejection.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    expected = []
    for name, run in runs.items():
        title = {"plain": "plain", "crossx": "Cross-X", "fast": "EfficientNet-Lite0"}[name.partition("-")[0]]
        for format_, files in run["files"].items():
            for precision, own in files.items():
                if (format_, precision) in (("onnx", "fp32"), ("openvino", "fp32")):
                    continue
                eager, test = format_ == "eager", own["test"]
                row = [title if eager else "", f"{100 * own['top1']:.2f}", f"{100 * test['kept']:.2f}"]
                row += [
                    f"{100 * (1 - own[folder]['kept']):.1f} ({100 * own[folder]['auroc']:.1f})"
                    if folder in own
                    else ""
                    for folder in ("near", "far", "flowers")
                ]
                row.append("" if eager else f"{test['similarity_rms']:.4f}")
                expected.append([*row, "" if eager else f"{1e3 * own['time']['median_s']:.2f}"])
        # float32 files decide as PyTorch
        for format_ in ("onnx", "openvino"):
            whole = run["files"][format_]["fp32"]
            assert all(
                own["alike"] == run["images"][folder]
                for folder, own in whole.items()
                if folder in run["images"]
            )
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    table = next(body for header, *body in tables(page) if "other species" in header and "ms" in header)
    assert [[row[0].partition(",")[0], *row[2:]] for row in table] == expected


def test_the_table_of_thresholds_of_int8_is_that_of_the_file() -> None:
    path = ROOT / "benchmarks" / "results" / "exported_rejection.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    expected = []
    for name, run in runs.items():
        title = {"plain": "plain", "crossx": "Cross-X", "fast": "EfficientNet-Lite0"}[name.partition("-")[0]]
        onnx, openvino = (run["files"][format_]["int8"] for format_ in ("onnx", "openvino"))
        for file, own, threshold, drawn in (
            ("float32", run["files"]["eager"]["fp32"], "", onnx["random"]["float32"]),
            ("ONNX, int8", onnx, "of float32", onnx["random"]["float32_threshold"]),
            ("", onnx, "set again", onnx["random"]["again"]),
            ("OpenVINO, int8", openvino, "of float32", openvino["random"]["float32_threshold"]),
            ("", openvino, "set again", openvino["random"]["again"]),
        ):
            measured = {
                folder: own[folder]["float32_threshold"] if threshold == "of float32" else own[folder]
                for folder in ("test", "near", "far", "flowers")
                if folder in own
            }
            row = [
                title if file == "float32" else "",
                file,
                threshold,
                f"{100 * measured['test']['kept']:.2f}",
            ]
            row += [
                f"{100 * (1 - measured[folder]['kept']):.1f}" if folder in measured else ""
                for folder in ("near", "far", "flowers")
            ]
            mean, deviation = drawn
            expected.append([*row, f"{100 * mean:.2f} ± {100 * deviation:.2f}"])
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    table = next(body for header, *body in tables(page) if header[2:3] == ["threshold"])
    assert [[row[0].partition(",")[0], *row[1:]] for row in table] == expected
