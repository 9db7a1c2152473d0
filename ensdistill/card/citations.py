"""What a card cites: the papers that a student's parts come from, as BibTeX."""

from collections.abc import Mapping
from typing import Any

from ensdistill import __version__

PROJECT = f"""@software{{ensdistill,
  title   = {{ensdistill: distilling deep ensembles into compact networks}},
  author  = {{{{the ensdistill authors}}}},
  version = {{{__version__}}},
  year    = {{2026}}
}}"""

PAPERS = {
    "nam2021diversity": ("inproceedings", "Diversity Matters When Learning From Ensembles",
        "Nam, Giung and Yoon, Jongmin and Lee, Yoonho and Lee, Juho",
        "Advances in Neural Information Processing Systems", 2021),
    "hinton2015distilling": ("misc", "Distilling the Knowledge in a Neural Network",
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff", "arXiv:1503.02531", 2015),
    "wen2020batchensemble": ("inproceedings",
        "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong Learning",
        "Wen, Yeming and Tran, Dustin and Ba, Jimmy",
        "International Conference on Learning Representations", 2020),
    "nam2022improving": ("inproceedings",
        "Improving Ensemble Distillation With Weight Averaging and Diversifying Perturbation",
        "Nam, Giung and Lee, Hyungi and Heo, Byeongho and Lee, Juho",
        "International Conference on Machine Learning", 2022),
    "tran2020hydra": ("misc",
        "Hydra: Preserving Ensemble Diversity for Model Distillation",
        "Tran, Linh and others", "arXiv:2001.04694", 2020),
    "havasi2021training": ("inproceedings",
        "Training independent subnetworks for robust prediction",
        "Havasi, Marton and others", "International Conference on Learning Representations", 2021),
    "laurent2023packed": ("inproceedings",
        "Packed-Ensembles for Efficient Uncertainty Estimation",
        "Laurent, Olivier and others", "International Conference on Learning Representations",
        2023),
    "malinin2020ensemble": ("inproceedings", "Ensemble Distribution Distillation",
        "Malinin, Andrey and Mlodozeniec, Bruno and Gales, Mark",
        "International Conference on Learning Representations", 2020),
    "ryabinin2021scaling": ("inproceedings",
        "Scaling Ensemble Distribution Distillation to Many Classes with Proxy Targets",
        "Ryabinin, Max and Malinin, Andrey and Gales, Mark",
        "Advances in Neural Information Processing Systems", 2021),
    "park2025knowledge": ("misc",
        "Knowledge Distillation of Uncertainty using Deep Latent Factor Model",
        "Park, Sehyun and others", "arXiv:2510.19290", 2025),
    "park2025ensemble": ("inproceedings",
        "Ensemble Distribution Distillation via Flow Matching",
        "Park, Jonggeon and Nam, Giung and Kim, Hyunsu and Yoon, Jongmin and Lee, Juho",
        "International Conference on Machine Learning", 2025),
    "tashiro2020diversity": ("inproceedings",
        "Diversity can be Transferred: Output Diversification for White- and Black-box Attacks",
        "Tashiro, Yusuke and Song, Yang and Ermon, Stefano",
        "Advances in Neural Information Processing Systems", 2020),
}  # fmt: skip
"""Kind of entry, title, authors, where it appeared, and year, by BibTeX key."""

SOURCES = {
    ("student", "batch_ensemble"): "wen2020batchensemble",
    ("student", "latent_batch_ensemble"): "nam2022improving",
    ("student", "hydra"): "tran2020hydra",
    ("student", "mimo"): "havasi2021training",
    ("student", "packed"): "laurent2023packed",
    ("student", "gaussian_logits"): "park2025knowledge",
    ("student", "flow_matching"): "park2025ensemble",
    ("objective", "ensemble_mean"): "hinton2015distilling",
    ("objective", "dirichlet"): "malinin2020ensemble",
    ("objective", "proxy_dirichlet"): "ryabinin2021scaling",
    ("perturbation", "ods"): "tashiro2020diversity",
    ("perturbation", "ods_each"): "tashiro2020diversity",
    ("perturbation", "tdiv_sdiv"): "nam2022improving",
}
"""The paper that a part of a method comes from, where that is not Nam et al. 2021."""


def citations(header: Mapping[str, Any]) -> list[str]:
    """BibTeX entries of the project, its paper, and the sources of a student's parts."""
    parts = [(axis, header.get(axis, {}).get("name")) for axis in ("student", "objective")]
    parts.append(("perturbation", header.get("perturbation", {}).get("name")))
    keys = dict.fromkeys(["nam2021diversity", *(SOURCES[it] for it in parts if it in SOURCES)])
    return [PROJECT, *map(_entry, keys)]


def _entry(key: str) -> str:
    kind, title, authors, where, year = PAPERS[key]
    place = "booktitle" if kind == "inproceedings" else "note"
    fields = {"title": f"{{{title}}}", "author": authors, place: where, "year": year}
    lines = [f"  {name:<9} = {{{value}}}" for name, value in fields.items()]
    return ",\n".join([f"@{kind}{{{key}", *lines]) + "\n}"
