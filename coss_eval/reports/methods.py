"""A "Methods" paragraph for papers and the references of what it names, from what the cells of a run say of themselves.

Only what was run is described, and only what is described is cited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from coss_eval.corruptions.names import BENCHMARK
from coss_eval.reports.latex import escape
from coss_eval.reports.results import Results
from coss_eval.store import Record

Sentences = list[str]  # LaTeX, with \cite where something is named


def methods(results: Results) -> str:
    """methods.tex: a paragraph to \\input, its citations those of references.bib."""
    parts = [*_data(results), *_networks(results)]
    for task in results.tasks:
        if task in TASKS:
            parts += TASKS[task](results, results.cells(task))
    parts += [*_statistics(results), *_software(results)]
    text = " ".join(parts)
    head = "% made by coss-eval from what the run says of itself; \\bibliography{references}"
    return f"{head}\n\\paragraph{{Evaluation.}}\n{text}\n"


def references(text: str) -> str:
    """references.bib: the entries that a text cites, by key."""
    keys = sorted({key for group in re.findall(r"\\cite\{([^}]*)\}", text) for key in group.split(",")})
    return "\n\n".join(f"@{_entry(key)}" for key in keys) + "\n"


def _entry(key: str) -> str:
    kind, fields = BIBLIOGRAPHY[key]
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"{kind}{{{key},\n{lines}\n}}"


def _values(cells: Iterable[Record], name: str) -> list[Any]:
    """The values of a parameter over cells, each once, lists by their entries; numbers rise."""
    found: dict[Any, None] = {}
    for cell in cells:
        value = cell["params"].get(name)
        found |= dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value])
    numeric = all(isinstance(value, int | float) for value in found)
    return sorted(found) if numeric else list(found)


def _listed(values: Sequence[object]) -> str:
    """ "a, b and c", escaped."""
    texts = [escape(f"{value:g}" if isinstance(value, float) else str(value)) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else ""


def _data(results: Results) -> Sentences:
    data = {str(r["protocol"].get("data", {}).get("name")): r["protocol"].get("data", {}) for r in results.records}
    counts = results.frame.groupby("data")["n"].max().to_dict()
    known = {
        "cifar": "krizhevsky2009learning", "tiny-imagenet": "le2015tiny", "imagenet": "deng2009imagenet",
        "stl10": "coates2011analysis", "digits": "pedregosa2011scikit",
    }  # fmt: skip
    texts = []
    for name, facts in data.items():
        cited = next((f"~\\cite{{{key}}}" for start, key in known.items() if name.startswith(start)), "")
        limit = facts.get("limit")
        subset = f", a class-balanced subset of {limit} of its test images" if limit else ""
        texts.append(f"{escape(name)}{cited} ({counts.get(name, 0)} test images{subset})")
    return [f"We evaluate on {' and '.join(texts)}."] if texts else []


def _networks(results: Results) -> Sentences:
    """The architectures, with whom they are by, and the training methods that the runs name."""
    archs = sorted({str(r["protocol"].get("model", {}).get("arch")) for r in results.records} - {"None"})
    known = {"resnet": "he2016deep", "vit": "dosovitskiy2021image", "convnext": "liu2022convnet"}
    keys = {key for name in archs for part, key in known.items() if part in name.lower()}
    cited = f"~\\cite{{{','.join(sorted(keys))}}}" if keys else ""
    count = len(results.checkpoints)
    found = [f"We compare {count} checkpoint{'s' * (count > 1)} ({_listed(archs)}{cited})."] if archs else []
    groups = {str(m["group"]) for run in results.runs for m in run.get("models", []) if m.get("group")}
    trained = {name: TRAINED[name.removeprefix("co-")] for name in groups if name.removeprefix("co-") in TRAINED}
    if trained:
        named = [f"{escape(name)}~\\cite{{{key}}}" for name, key in sorted(trained.items())]
        found.append(f"They were trained with {', '.join(named)}.")
    return found


def _probe(results: Results, cells: Sequence[Record]) -> Sentences:
    found = []
    linear = [cell for cell in cells if cell["params"].get("method") == "linear"]
    few = [cell for cell in linear if "labels" in cell["params"]]
    if linear:
        found.append(
            "Linear probes are logistic regressions on the frozen global representation, their strength chosen on a "
            "tenth of the training images~\\cite{kolesnikov2019revisiting}."
        )
    if few:
        shares = [f"{100 * share:g} %" for share in _values(few, "labels")]
        draws = max(_values(few, "draws"), default=1)
        sets = f", averaged over {draws} nested, class-balanced label sets" if draws > 1 else ""
        found.append(f"Few-label probes have {_listed(shares)} of the labels{sets}.")
    neighbours = [cell for cell in cells if cell["params"].get("method") == "knn"]
    if neighbours:
        k, temperature = _listed(_values(neighbours, "k")), _listed(_values(neighbours, "temperature"))
        found.append(f"The kNN classifier has $k={k}$ and temperature {temperature}~\\cite{{caron2021emerging}}.")
    sgd = [cell for cell in cells if cell["params"].get("method") == "sgd"]
    if sgd:
        epochs = _listed(_values(sgd, "epochs"))
        found.append(f"Linear layers are also trained by SGD for {epochs} epochs on random crops and flips.")
    return found


def _corruptions(results: Results, cells: Sequence[Record]) -> Sentences:
    names = [name for name in _values(cells, "corruption") if name != "clean"]
    if not names:
        return []
    severities = _listed(_values(cells, "severities"))
    whole = set(names) >= set(BENCHMARK)
    which = f"the {len(BENCHMARK)} of the benchmark" if whole else _listed([str(n).replace("_", " ") for n in names])
    more = f" and {len(set(names) - set(BENCHMARK))} held-out ones" if whole and set(names) - set(BENCHMARK) else ""
    imagecorruptions = "imagecorruptions" in _values(cells, "flavour")
    form = " in the form of imagecorruptions~\\cite{michaelis2019benchmarking}" if imagecorruptions else ""
    return [
        f"Common corruptions~\\cite{{hendrycks2019benchmarking}} are {which}{more}, at severities {severities}{form}."
    ]


def _attacks(results: Results, cells: Sequence[Record]) -> Sentences:
    cited = {
        "pgd": "madry2018towards", "fgsm": "goodfellow2015explaining", "square": "andriushchenko2020square",
        "apgd": "croce2020reliable",
    }  # fmt: skip
    found = []
    for attack, norm in dict.fromkeys((str(c["params"].get("attack")), str(c["params"].get("norm"))) for c in cells):
        mine = [c for c in cells if (c["params"].get("attack"), c["params"].get("norm")) == (attack, norm)]
        eps = [f"{e * 255:g}/255" if norm == "linf" else f"{e:g}" for e in _values(mine, "eps")]
        key = next((f"~\\cite{{{key}}}" for name, key in cited.items() if attack.startswith(name)), "")
        steps = _values(mine, "steps")
        with_steps = f" with {_listed(steps)} steps" if steps else ""
        images = max(_values(mine, "images"), default=0)
        on = f" on {images} images" if images else ""
        norm_text = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$"}.get(norm, escape(norm))
        what = f"{escape(attack.upper())}{key} in {norm_text}{with_steps}"
        found.append(f"We attack with {what}, $\\epsilon$ {_listed(eps)}{on}.")
    if "reference" in _values(cells, "backend"):
        found.append("Attacks are foolbox's~\\cite{rauber2020foolbox}.")
    return found


def _internal(results: Results, cells: Sequence[Record]) -> Sentences:
    kinds, sites = _listed(_values(cells, "kind")), _listed(_values(cells, "site"))
    seeds = len(_values(cells, "seeds"))
    return [f"Damage inside the networks ({kinds} at {sites}) is averaged over {seeds} seeds."]


def _crops(results: Results, cells: Sequence[Record]) -> Sentences:
    return [f"Crops of the test images vary by {_listed(_values(cells, 'family'))}."]


def _redundancy(results: Results, cells: Sequence[Record]) -> Sentences:
    metrics = {m["metric"] for cell in cells for m in cell["measurements"]}
    found = [
        "Redundancy is the mean cosine of the local representations of one image relative to that of two images, the "
        "mean of each position of the grid taken off first, beside the same network untrained."
    ]
    extra = {
        "rankme_global": "RankMe~\\cite{garrido2023rankme}",
        "lidar": "LiDAR~\\cite{thilak2024lidar}",
        "local_global_cka": "linear CKA~\\cite{kornblith2019similarity}",
    }
    named = [text for metric, text in extra.items() if metric in metrics]
    return found + ([f"Beside it stand {', '.join(named)}."] if named else [])


def _statistics(results: Results) -> Sentences:
    found = ["Intervals are 95\\,\\%: Wilson's~\\cite{wilson1927probable} for proportions over images."]
    if len(results.labels) < 2:
        return found
    found.append(
        "Differences are paired over images (Newcombe's interval~\\cite{newcombe1998improved}, McNemar's "
        "mid-p~\\cite{fagerland2013mcnemar}), $p$ adjusted over each table~\\cite{holm1979simple}."
    )
    if results.groups.members:
        found.append(
            "Methods are compared over training seeds and images: readers nested in "
            "methods~\\cite{obuchowski1995hypothesis} with Satterthwaite's degrees of "
            "freedom~\\cite{satterthwaite1946approximate}."
        )
    return found


def _software(results: Results) -> Sentences:
    versions = {name: str(v) for run in results.runs for name, v in run.get("versions", {}).items()}
    own = versions.get("coss_eval")
    torch = versions.get("torch")
    if not (own or torch):
        return []
    named = [f"coss-eval {escape(own)}"] if own else []
    named += [f"PyTorch {escape(torch)}~\\cite{{paszke2019pytorch}}"] if torch else []
    return [f"All numbers are from {' with '.join(named)}."]


TASKS: dict[str, Callable[[Results, Sequence[Record]], Sentences]] = {
    "probe": _probe,
    "corruptions": _corruptions,
    "attacks": _attacks,
    "internal": _internal,
    "crops": _crops,
    "redundancy": _redundancy,
}
TRAINED = {
    "byol": "grill2020bootstrap",
    "dino": "caron2021emerging",
    "mocov3": "chen2021empirical",
    "simclr": "chen2020simple",
    "simsiam": "chen2021exploring",
    "vicreg": "bardes2022vicreg",
    "barlow": "zbontar2021barlow",
}


def _paper(author: str, title: str, year: int, **where: str) -> tuple[str, dict[str, str]]:
    """An article where it has a journal, else a paper in proceedings or what else ``where`` says."""
    kind = "article" if "journal" in where else "inproceedings" if "booktitle" in where else "techreport"
    return kind, {"author": author, "title": f"{{{title}}}", **where, "year": str(year)}


_ICLR, _ICML = "International Conference on Learning Representations", "International Conference on Machine Learning"
_CVPR = "IEEE Conference on Computer Vision and Pattern Recognition"
_ICCV = "IEEE International Conference on Computer Vision"
_NEURIPS = "Advances in Neural Information Processing Systems"
BIBLIOGRAPHY = {
    "andriushchenko2020square": _paper(
        "Andriushchenko, Maksym and Croce, Francesco and Flammarion, Nicolas and Hein, Matthias",
        "Square Attack: a query-efficient black-box adversarial attack via random search",
        2020,
        booktitle="European Conference on Computer Vision",
    ),
    "bardes2022vicreg": _paper(
        "Bardes, Adrien and Ponce, Jean and LeCun, Yann",
        "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
        2022,
        booktitle=_ICLR,
    ),
    "caron2021emerging": _paper(
        "Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien and "
        "Bojanowski, Piotr and Joulin, Armand",
        "Emerging Properties in Self-Supervised Vision Transformers",
        2021,
        booktitle=_ICCV,
    ),
    "chen2020simple": _paper(
        "Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey",
        "A Simple Framework for Contrastive Learning of Visual Representations",
        2020,
        booktitle=_ICML,
    ),
    "chen2021empirical": _paper(
        "Chen, Xinlei and Xie, Saining and He, Kaiming",
        "An Empirical Study of Training Self-Supervised Vision Transformers",
        2021,
        booktitle=_ICCV,
    ),
    "chen2021exploring": _paper(
        "Chen, Xinlei and He, Kaiming", "Exploring Simple Siamese Representation Learning", 2021, booktitle=_CVPR
    ),
    "coates2011analysis": _paper(
        "Coates, Adam and Ng, Andrew and Lee, Honglak",
        "An Analysis of Single-Layer Networks in Unsupervised Feature Learning",
        2011,
        booktitle="International Conference on Artificial Intelligence and Statistics",
    ),
    "croce2020reliable": _paper(
        "Croce, Francesco and Hein, Matthias",
        "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
        2020,
        booktitle=_ICML,
    ),
    "deng2009imagenet": _paper(
        "Deng, Jia and Dong, Wei and Socher, Richard and Li, Li-Jia and Li, Kai and Fei-Fei, Li",
        "ImageNet: A large-scale hierarchical image database",
        2009,
        booktitle=_CVPR,
    ),
    "dosovitskiy2021image": _paper(
        "Dosovitskiy, Alexey and others",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        2021,
        booktitle=_ICLR,
    ),
    "fagerland2013mcnemar": _paper(
        "Fagerland, Morten W. and Lydersen, Stian and Laake, Petter",
        "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better than exact conditional",
        2013,
        journal="BMC Medical Research Methodology",
        volume="13",
    ),
    "garrido2023rankme": _paper(
        "Garrido, Quentin and Balestriero, Randall and Najman, Laurent and LeCun, Yann",
        "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by Their Rank",
        2023,
        booktitle=_ICML,
    ),
    "goodfellow2015explaining": _paper(
        "Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian",
        "Explaining and Harnessing Adversarial Examples",
        2015,
        booktitle=_ICLR,
    ),
    "grill2020bootstrap": _paper(
        "Grill, Jean-Bastien and others",
        "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
        2020,
        booktitle=_NEURIPS,
    ),
    "he2016deep": _paper(
        "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
        "Deep Residual Learning for Image Recognition",
        2016,
        booktitle=_CVPR,
    ),
    "hendrycks2019benchmarking": _paper(
        "Hendrycks, Dan and Dietterich, Thomas",
        "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
        2019,
        booktitle=_ICLR,
    ),
    "holm1979simple": _paper(
        "Holm, Sture",
        "A Simple Sequentially Rejective Multiple Test Procedure",
        1979,
        journal="Scandinavian Journal of Statistics",
        volume="6",
        pages="65--70",
    ),
    "kolesnikov2019revisiting": _paper(
        "Kolesnikov, Alexander and Zhai, Xiaohua and Beyer, Lucas",
        "Revisiting Self-Supervised Visual Representation Learning",
        2019,
        booktitle=_CVPR,
    ),
    "kornblith2019similarity": _paper(
        "Kornblith, Simon and Norouzi, Mohammad and Lee, Honglak and Hinton, Geoffrey",
        "Similarity of Neural Network Representations Revisited",
        2019,
        booktitle=_ICML,
    ),
    "krizhevsky2009learning": _paper(
        "Krizhevsky, Alex",
        "Learning Multiple Layers of Features from Tiny Images",
        2009,
        institution="University of Toronto",
    ),
    "le2015tiny": _paper(
        "Le, Ya and Yang, Xuan", "Tiny ImageNet Visual Recognition Challenge", 2015, institution="Stanford University"
    ),
    "liu2022convnet": _paper(
        "Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and others",
        "A ConvNet for the 2020s",
        2022,
        booktitle=_CVPR,
    ),
    "madry2018towards": _paper(
        "Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian",
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        2018,
        booktitle=_ICLR,
    ),
    "michaelis2019benchmarking": _paper(
        "Michaelis, Claudio and others",
        "Benchmarking Robustness in Object Detection: Autonomous Driving when Winter is Coming",
        2019,
        journal="arXiv preprint arXiv:1907.07484",
    ),
    "newcombe1998improved": _paper(
        "Newcombe, Robert G.",
        "Improved confidence intervals for the difference between binomial proportions based on paired data",
        1998,
        journal="Statistics in Medicine",
        volume="17",
        pages="2635--2650",
    ),
    "obuchowski1995hypothesis": _paper(
        "Obuchowski, Nancy A. and Rockette, Howard E.",
        "Hypothesis testing of diagnostic accuracy for multiple readers and multiple tests: an ANOVA approach with "
        "dependent observations",
        1995,
        journal="Communications in Statistics - Simulation and Computation",
        volume="24",
        pages="285--308",
    ),
    "paszke2019pytorch": _paper(
        "Paszke, Adam and others",
        "PyTorch: An Imperative Style, High-Performance Deep Learning Library",
        2019,
        booktitle=_NEURIPS,
    ),
    "pedregosa2011scikit": _paper(
        "Pedregosa, Fabian and others",
        "Scikit-learn: Machine Learning in Python",
        2011,
        journal="Journal of Machine Learning Research",
        volume="12",
        pages="2825--2830",
    ),
    "rauber2020foolbox": _paper(
        "Rauber, Jonas and Zimmermann, Roland and Bethge, Matthias and Brendel, Wieland",
        "Foolbox Native: Fast adversarial attacks to benchmark the robustness of machine learning models in PyTorch, "
        "TensorFlow, and JAX",
        2020,
        journal="Journal of Open Source Software",
        volume="5",
    ),
    "satterthwaite1946approximate": _paper(
        "Satterthwaite, Franklin E.",
        "An Approximate Distribution of Estimates of Variance Components",
        1946,
        journal="Biometrics Bulletin",
        volume="2",
        pages="110--114",
    ),
    "thilak2024lidar": _paper(
        "Thilak, Vimal and others",
        "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures",
        2024,
        booktitle=_ICLR,
    ),
    "wilson1927probable": _paper(
        "Wilson, Edwin B.",
        "Probable Inference, the Law of Succession, and Statistical Inference",
        1927,
        journal="Journal of the American Statistical Association",
        volume="22",
        pages="209--212",
    ),
    "zbontar2021barlow": _paper(
        "Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, St{\\'e}phane",
        "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        2021,
        booktitle=_ICML,
    ),
}
