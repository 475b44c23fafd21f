from leakage.seeds import derive_seed


def test_derive_seed():
    seeds = [
        derive_seed(seed, victim, stream) for seed in (0, 1) for victim in range(50) for stream in ("weights", "start")
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 0, "weights") == 9090995700323409191, "every published figure would change"
