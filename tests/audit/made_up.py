"""A made-up report with all kinds of rows, and the victims and pictures that belong to it."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

from PIL import Image, ImageFilter

import leakage.datamodules
from leakage.audit.report import (
    VERSION,
    AuditReport,
    Bound,
    Check,
    Declared,
    Figure,
    Measured,
    Planned,
    Problem,
    Threshold,
    VictimRow,
    write_victims,
)

HOSTILE = '<script>alert("x")</script> & <b>bold</b> | `code` \x1b[31m\u202eevil ]]>'
NAN, INFINITE = math.nan, math.inf

CHECKS = [
    Check("phone", "matching distance at the truth", True, 3.1e-13, "Zero but for rounding."),
    Check("hospital, DP-SGD", "matching distance at the truth", True, 2.2e-13, "Zero but for rounding."),
    Check(HOSTILE, "last layer's bias gradient sums to zero", True, None, "As cross-entropy has it."),
]
FAILED = Check(
    "phone",
    "declared learning rate",
    False,
    0.9,
    "The update is 10.0 times as large as the declared client's. A learning rate of 0.1 in place of 0.01 explains it.",
)
PHONE = Figure(0.925, 0.801, 0.974, 40)
EXCEEDED = Threshold("success_rate", 0.05, "phone", "Inverting Gradients", PHONE, "exceeded")
INCONCLUSIVE = Threshold("identified", 0.2, "hospital, DP-SGD", "iDLG", Figure(0.125, 0.055, 0.262, 40), "inconclusive")
WITHIN = Threshold("success_rate", 0.1, "hospital, DP-SGD", "iDLG", Figure(0.0, 0.0, 0.088, 40), "within")
UNREACHED = Threshold("success_rate", 0.1, "hospital, DP-SGD", "GIAS", Figure(0.0, 0.0, 0.088, 40), "inconclusive")


def made_up_victims() -> list[VictimRow]:
    """Rows of two clients, three attacks and forty victims; those of the first sixteen victims have pictures."""
    generator = random.Random(0)
    kinds = {
        ("phone", "Inverting Gradients"): (38, 9),
        ("phone", "iDLG"): (24, 9),
        ("hospital, DP-SGD", "iDLG"): (9, 3),
    }
    rows = []
    for index, ((client, attack), (middle, spread)) in enumerate(kinds.items()):
        for victim in range(40):
            psnr = INFINITE if (index, victim) == (0, 3) else generator.gauss(middle, spread)
            names = [f"images/{index}-{victim}-{kind}.png" if victim < 16 else "" for kind in ("a", "b", "c")]
            mse = 10 ** (-psnr / 10)
            found, likeness = generator.choice([victim % 10, 3]), min(1.0, max(0.0, psnr / 50))
            guess = generator.gauss(15, 2)
            rows.append(
                VictimRow(
                    *(client, attack, victim, 0, victim % 10, found, psnr, mse, likeness),
                    *(mse < 1e-3, psnr > 20, guess, *names),
                )
            )
    return rows


def made_up_report() -> AuditReport:
    """All kinds of rows; what the thresholds and checks say can be replaced."""
    victims = made_up_victims()

    def worst(client: str, attack: str) -> list[VictimRow]:
        own = [row for row in victims if (row.client, row.attack) == (client, attack)]
        return sorted(own, key=lambda row: -row.psnr)[:8]

    guesses = {
        "grey": Figure(8.9, 8.1, 9.7, 40),
        "mean_colour": Figure(12.0, 11.1, 12.9, 40),
        "nearest": Figure(15.2, 14.5, 15.9, 40),
    }

    def scores(success: Figure, psnr: Figure) -> dict[str, Figure]:
        other = {"identified": Figure(0.9, 0.77, 0.96, 40), "ssim": Figure(0.7, 0.6, 0.8, 40)}
        return {"success_rate": success, "label_accuracy": labels, "psnr": psnr, **other}

    clear, noisy, one = Figure(INFINITE, NAN, NAN, 40), Figure(9.1, 8.2, 10.0, 40), Figure(31.0, NAN, NAN, 1)
    none, labels = Figure(0.0, 0.0, 0.088, 40), Figure(1.0, 0.912, 1.0, 40)
    measured = [
        Measured(
            *("hospital, DP-SGD", "iDLG", True, 8, 40, 300.0, 61.0, scores(none, noisy), guesses),
            worst("hospital, DP-SGD", "iDLG"),
        ),
        Measured(
            *("phone", "Inverting Gradients", False, 1, 40, 4800.0, 219.0, scores(PHONE, clear), guesses),
            worst("phone", "Inverting Gradients"),
        ),
        Measured(
            *("phone", "iDLG", False, 1, 40, 212.4, 31.0),
            scores(Figure(0.275, 0.161, 0.428, 40), Figure(23.7, 20.8, 26.6, 40)),
            guesses,
            worst("phone", "iDLG"),
        ),
        Measured(HOSTILE, HOSTILE, False, 1, 1, 10.0, 0.04, scores(Figure(1.0, NAN, NAN, 1), one), {}, []),
        Measured(
            "phone", "labels only", False, 1, 40, 0.0, 0.5, {"label_accuracy": Figure(1.0, 0.912, 1.0, 40)}, {}, []
        ),
        Measured("phone", "no victims", False, 1, 0, NAN, 0.0, {"success_rate": Figure(NAN, NAN, NAN, 0)}, {}, []),
    ]
    return AuditReport(
        version=VERSION,
        leakage="0.1.0",
        created="2026-01-31T12:00:00+00:00",
        seed=0,
        model="shop.models.ProductClassifier",
        data="shop.data.Products, 1,000 test images of 3 x 32 x 32",
        success_threshold=1e-3,
        budget_seconds=600.0,
        command="leakage audit --model shop.models.ProductClassifier --data shop.data.Products --client.images 8 \\\n"
        "    --budget 10m --output audit/ --fail-above success_rate=0.05 identified=0.2",
        declared=Declared(
            "B: the server is honest but curious, sees each client's update by itself and knows model and protocol",
            "images of the same kind, none of them the client's",
            [
                {"name": "phone", "images": 1, "local_steps": 1, "learning_rate": 0.01, "defenses": [], "epochs": 0},
                {
                    "name": "hospital, DP-SGD",
                    "images": 8,
                    "local_steps": 5,
                    "learning_rate": 0.01,
                    "defenses": [{"clip": 1.0}, "noise 1.1"],
                    "accuracy": 0.913,
                },
                {"name": HOSTILE, "secure_aggregation": True, "momentum": None},
            ],
            {"secure_aggregation": "no", HOSTILE: HOSTILE, "policy": "see https://example.org/policy?a=1&b=2"},
        ),
        preflight=[
            Problem("replace", "encoder.block1.relu", "ReLU(inplace=True)", "Set inplace=False.", "None once done."),
            Problem(
                "not yet",
                "head.dropout",
                "Dropout is drawn anew by the client.",
                "Audit in evaluation mode.",
                "Attacks with the mask unknown are weaker than those of an attacker who searches for it.",
            ),
            Problem("never", HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        ],
        checks=list(CHECKS),
        plan=[
            Planned("phone", "iDLG", 30.0, True, ""),
            Planned("phone", "Inverting Gradients", 240.0, True, ""),
            Planned("hospital, DP-SGD", "iDLG", 60.0, True, ""),
            Planned("hospital, DP-SGD", "GIAS", 4200.0, False, "The budget of 10 min ended first."),
            Planned(HOSTILE, HOSTILE, NAN, False, HOSTILE),
        ],
        measured=measured,
        bounds=[
            Bound(
                "hospital, DP-SGD",
                "DP-SGD, noise multiplier 1.1, 20 steps",
                "success_rate",
                0.24,
                "Hayes, Mahloujifar and Balle 2023, https://arxiv.org/abs/2302.07225",
            )
        ],
        thresholds=[EXCEEDED, WITHIN, INCONCLUSIVE, UNREACHED],
    )


def variant(verdict: str) -> AuditReport:
    """The made-up report with a verdict."""
    report = made_up_report()
    changes = {
        "exceeded": {},
        "inconclusive": {"thresholds": [WITHIN, INCONCLUSIVE, UNREACHED]},
        "within": {"thresholds": [WITHIN]},
        "no thresholds": {"thresholds": []},
        "failed check": {
            "checks": [*CHECKS, FAILED],
            "measured": [],
            "thresholds": [],
            "bounds": [],
            "preflight": [],
            "plan": [dataclasses.replace(one, done=False, reason="The self-check failed.") for one in report.plan],
        },
    }
    return dataclasses.replace(report, **changes[verdict])


def write_pictures(folder: Path) -> None:
    """The victims' lines and pictures: images of the bundled sample, blurred and as squares in their places."""
    rows = made_up_victims()
    write_victims(folder, rows)
    sheet = Image.open(Path(leakage.datamodules.__file__).with_name("fashion_mnist_sample.png"))
    for row in rows:
        if row.truth:
            (folder / row.truth).parent.mkdir(exist_ok=True, parents=True)
            left, top = 28 * row.victim, 28 * (row.victim % 10)
            image = sheet.crop((left, top, left + 28, top + 28))
            image.save(folder / row.truth)
            image.filter(ImageFilter.GaussianBlur(max(0.0, (34 - row.psnr) / 8))).save(folder / row.reconstruction)
            Image.new("L", (28, 28), 60 + 4 * row.victim).save(folder / row.guess)
