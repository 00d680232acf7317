"""The figures of `benchmarks.backtranslation` for a terminal, with their goals."""


def table(part: str, figures: dict) -> str:
    """One part: speed, memory or quality."""
    return "\n".join({"speed": speed, "memory": memory, "quality": quality}[part](figures))


def speed(figures: dict) -> list[str]:
    learned, size = figures["vocabulary_learned"], figures["vocabulary"]
    lines = [
        f"\nspeed: {figures['source_pieces']:.1f} pieces in"
        f" (± {figures['source_pieces_deviation']:.1f}), {figures['target_pieces']} out, beam"
        f" {figures['beam']}, {figures['parameters']['marian']:,} parameters, {size:,} pieces"
        f" ({learned:,} of the corpus), {figures['threads']} threads, {figures['rounds']} rounds"
    ]
    peers = list(next(iter(figures["sides"].values()))["over"])
    for letter, peer in zip("abc", peers, strict=True):
        lines.append(f"({letter}) {peer}{tried_of(peer, figures)}")
    heads = "".join(f"{f'over ({letter})':>11}" for letter in "abc"[: len(peers)])
    lines.append(f"  {'':<30}{'lines':>6}{'lines/s':>9}{heads}{'peak MB':>9}")
    for name, side in figures["sides"].items():
        ratios = "".join(f"{side['over'][peer]['ratio']:>9.2f} ×" for peer in peers)
        lines.append(
            f"  {name:<30}{side['lines']:>6}{side['median']:>9.2f}{ratios}{side['peak_mb']:>9.0f}"
        )
    ours = {name: side for name, side in figures["sides"].items() if name not in peers}
    best = max(ours, key=lambda name: ours[name]["median"])
    for letter, peer in zip("abc", peers, strict=True):
        if peer not in figures["goals"]:
            continue
        goal = figures["goals"][peer]
        there = [name for name in ours if ours[name]["over"][peer]["ratio"] >= goal]
        over = ours[best]["over"][peer]
        lines.append(
            f"goal {goal:g} × ({letter}): {reached(bool(there))}, {over['ratio']:.2f} ×"
            f" ({over['ratio_min']:.2f} to {over['ratio_max']:.2f}) by {best};"
            f" {len(there)} of {len(ours)} back ends"
        )
    return lines


def tried_of(peer: str, figures: dict) -> str:
    """Which batch sizes a peer was tried with."""
    for word, key in (("batched", "rates_of_batches"), ("fairseq-generate", "rates_of_max_tokens")):
        if word in peer:
            rates = ", ".join(f"{size}: {rate:.2f}" for size, rate in figures[key].items())
            return f" (lines/s by batch size: {rates})"
    return ""


def memory(figures: dict) -> list[str]:
    runs = figures["runs"]
    lines = ["\nmemory of generate with a model that does nothing"]
    for one in runs:
        lines.append(
            f"  {one['lines']:>10,} lines ({one['input_mb']:.1f} MB): peak {one['peak_mb']:.0f} MB,"
            f" {one['rate']:,.0f} lines/s, {one['seconds']:.1f} s"
        )
    (first, *_, last) = runs if len(runs) > 1 else runs * 2
    more = last["peak_mb"] - first["peak_mb"]
    text = last["input_mb"] - first["input_mb"]
    lines.append(f"  peak {more:+.1f} MB from the first to the last, whose text has {text:+.1f} MB")
    return lines


def quality(figures: dict) -> list[str]:
    lines = [
        f"\nquality: {figures['sentences']} sentences {figures['source']}-{figures['target']},"
        f" beam {figures['beam']}"
    ]
    for name, side in figures["sides"].items():
        lines.append(
            f"  {name:<30}BLEU {side['bleu']:6.2f}  {side['difference']:+.2f}"
            f"  same lines {100 * side['same_lines']:5.1f} %  {side['rate']:.1f} lines/s"
        )
    for name, side in figures["sides"].items():
        if "int8" in name:
            there = reached(abs(side["difference"]) <= figures["goal"])
            goal = f"goal {name} within {figures['goal']:g} BLEU: {there}"
            lines.append(f"{goal}, {side['difference']:+.2f}")
    return lines


def reached(there: bool) -> str:
    return "reached" if there else "missed"
