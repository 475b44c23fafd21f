"""Defenses: what a client does to its gradient before it shares it, and how an attacker who knows them responds."""

from leakage.defenses.ats import ATS
from leakage.defenses.base import Client, Defense, Size, known_defenses, size_sent
from leakage.defenses.clip import Clip
from leakage.defenses.dp_sgd import DPSGD
from leakage.defenses.encoding import Encoding, encoded
from leakage.defenses.gaussian_noise import GaussianNoise
from leakage.defenses.half_precision import HalfPrecision
from leakage.defenses.instahide import InstaHide
from leakage.defenses.instahide_decoding import decode_instahide
from leakage.defenses.laplace_noise import LaplaceNoise
from leakage.defenses.mixup import MixUp
from leakage.defenses.precode import PRECODE, VariationalBottleneck
from leakage.defenses.quantise import Quantise
from leakage.defenses.random_pruning import RandomPruning
from leakage.defenses.sign import Sign
from leakage.defenses.soteria import Soteria
from leakage.defenses.top_k import TopK

__all__ = [
    "ATS",
    "DPSGD",
    "PRECODE",
    "Client",
    "Clip",
    "Defense",
    "Encoding",
    "GaussianNoise",
    "HalfPrecision",
    "InstaHide",
    "LaplaceNoise",
    "MixUp",
    "Quantise",
    "RandomPruning",
    "Sign",
    "Size",
    "Soteria",
    "TopK",
    "VariationalBottleneck",
    "decode_instahide",
    "encoded",
    "known_defenses",
    "size_sent",
]
