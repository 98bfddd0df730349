"""Times scoring, re-ranking and search, each beside the plain way of doing it, in processes of their own.

    python benchmarks/evaluation.py ranking reranking options --repeats 5   # --dense market: needs 9 GB of memory
    python benchmarks/evaluation.py search

Embeddings are drawn: people with looks in common, cameras with a bias, blurred pictures, at the sizes of Market-1501
(3,368 queries, 15,913 gallery entries, 750 people, 6 cameras) and MSMT17 (11,659, 82,161, 3,060, 15), 384 numbers
each. Each line is the median of fresh processes; plain and ours take turns. CPU seconds count all threads, and
distances; extra memory is the peak above what the process held with its embeddings loaded. `--fastreid FOLDER` adds
fast-reid's Cython ranking from the folder where you built its rank_cylib. With `--device cuda` all embeddings of
ranking and re-ranking lie on the GPU, where the plain way computes its distances; it does the rest in numpy, as ReID
toolboxes do. Search goes to the Qdrant server that the
variable QDRANT_URL names, else to Qdrant in memory; `qdrant-edge` is the server's engine in this process
(`pip install qdrant-edge-py`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "market": (3_368, 15_913, 750, 6),
    "market/2": (1_684, 7_956, 375, 6),
    "msmt17": (11_659, 82_161, 3_060, 15),
}
DIM = 384
# The plain ranking keeps whole matrices; at this size only every n-th query goes through it, its cost being linear.
EVERY = {"market": 1, "msmt17": 8}


def draw(size: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Unit embeddings and ids by the argument names of `evaluate_reid`."""
    queries, gallery, people, cameras = SIZES[size]
    rng = np.random.default_rng(seed)
    looks = rng.normal(size=(people // 20, DIM)).astype(np.float32)
    persons = looks[rng.integers(0, len(looks), people + 1)] + rng.normal(size=(people + 1, DIM)).astype(np.float32)
    biases = 0.5 * rng.normal(size=(cameras, DIM)).astype(np.float32)
    case: dict[str, np.ndarray] = {}
    for name, count in (("query", queries), ("gallery", gallery)):
        ids, where = rng.integers(1, people + 1, count), rng.integers(0, cameras, count)
        noise = rng.gamma(4, 0.45, size=(count, 1)).astype(np.float32)  # some pictures show little of the person
        rows = persons[ids] + biases[where] + noise * rng.normal(size=(count, DIM)).astype(np.float32)
        case[f"{name}_embeddings"] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        case[f"{name}_person_ids"], case[f"{name}_camera_ids"] = ids, where
    return case


def on_gpu(case: dict[str, np.ndarray]) -> dict[str, Any]:
    """The case with its embeddings on a GPU that is warm."""
    import torch

    case = {name: torch.from_numpy(x).cuda() if "embeddings" in name else x for name, x in case.items()}
    query = case["query_embeddings"]
    (query @ query.T + (query.double() @ query.double().T)).argsort().cpu()
    return case


def on_host(distances: Any) -> np.ndarray:
    """An array, or what a tensor holds as one."""
    return distances if isinstance(distances, np.ndarray) else distances.cpu().numpy()


def plain_ranking(case: dict[str, np.ndarray], every: int) -> dict[str, float]:
    """All distances, all of them sorted, then one query at a time: what ReID toolboxes do."""
    part = {name: values[::every] if name.startswith("query") else values for name, values in case.items()}
    distances = on_host(1 - part["query_embeddings"] @ part["gallery_embeddings"].T)
    order = np.argsort(distances, axis=1)
    right = (part["gallery_person_ids"][order] == part["query_person_ids"][:, None]).astype(np.int32)
    precisions, first_hits = [], []
    for query, camera in enumerate(part["query_camera_ids"]):
        ignored = (right[query] == 1) & (part["gallery_camera_ids"][order[query]] == camera)
        hits = right[query][~ignored]
        if hits.any():
            found = hits.cumsum()
            precisions.append((found / np.arange(1, hits.size + 1) * hits).sum() / hits.sum())
            first_hits.append(hits[0])
    return {"mAP": float(np.mean(precisions)), "rank1": float(np.mean(first_hits))}


def cython_ranking(case: dict[str, np.ndarray], every: int) -> dict[str, float]:
    """fast-reid's compiled ranking, built by the caller."""
    import rank_cy  # from --fastreid

    part = {name: values[::every] if name.startswith("query") else values for name, values in case.items()}
    distances = on_host(1 - part["query_embeddings"] @ part["gallery_embeddings"].T)
    ids = [part[f"{side}_{kind}_ids"] for kind in ("person", "camera") for side in ("query", "gallery")]
    cmc, precisions, _ = rank_cy.evaluate_cy(distances, *ids, 50)
    return {"mAP": float(np.mean(precisions)), "rank1": float(cmc[0])}


def our_ranking(case: dict[str, np.ndarray], every: int = 1, **options: Any) -> dict[str, float]:
    """`evaluate_reid`."""
    from personvit_hf.reid_retrieval.ranking import evaluate_reid

    part = {name: values[::every] if name.startswith("query") else values for name, values in case.items()}
    figures = evaluate_reid(**part, **options)
    return {name: figures[name] for name in ("mAP", "rank1")}


def plain_reranking(case: dict[str, np.ndarray], k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """k-reciprocal re-ranking with arrays of images x images, as it is published."""
    query, gallery = case["query_embeddings"], case["gallery_embeddings"]
    count, num_queries = len(query) + len(gallery), len(query)
    if isinstance(query, np.ndarray):
        images = np.concatenate([query, gallery])
    else:
        images = query.new_empty(count, DIM)
        images[:num_queries], images[num_queries:] = query, gallery
    squares = (images**2).sum(axis=1)
    distances = on_host(squares[:, None] + squares - 2 * images @ images.T)
    distances /= distances.max(axis=1, keepdims=True)
    order = np.argsort(distances).astype(np.int32)

    def mutual(image: int, k: int) -> np.ndarray:
        forward = order[image, : k + 1]
        return forward[(order[forward, : k + 1] == image).any(axis=1)]

    codes = np.zeros_like(distances)
    for image in range(count):
        own = expanded = mutual(image, k1)
        for candidate in own:
            theirs = mutual(candidate, round(k1 / 2))
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                expanded = np.append(expanded, theirs)
        expanded = np.unique(expanded)
        weights = np.exp(-distances[image, expanded])
        codes[image, expanded] = weights / weights.sum()
    distances = distances[:num_queries]
    if k2 > 1:
        codes = np.stack([codes[order[image, :k2]].mean(axis=0) for image in range(count)])
    holders = [np.flatnonzero(codes[:, image]) for image in range(count)]
    jaccard = np.zeros_like(distances)
    for image in range(num_queries):
        shared = np.zeros(count, np.float32)
        for neighbour in np.flatnonzero(codes[image]):
            others = holders[neighbour]
            shared[others] += np.minimum(codes[image, neighbour], codes[others, neighbour])
        jaccard[image] = 1 - shared / (2 - shared)
    return (jaccard * (1 - lambda_value) + distances * lambda_value)[:, num_queries:]


def reranked_figures(case: dict[str, np.ndarray], distances: np.ndarray) -> dict[str, float]:
    """Scores of re-ranked distances."""
    ids = {name: values for name, values in case.items() if "embeddings" not in name}
    return our_ranking({**ids, "distances": distances})


def our_options(case: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Scores of each change to embeddings or distances."""
    from personvit_hf import rerank
    from personvit_hf.reid_retrieval.expansion import expand_queries, remove_camera_bias

    query, gallery = case["query_embeddings"], case["gallery_embeddings"]
    cameras = np.concatenate([case["query_camera_ids"], case["gallery_camera_ids"]])
    unbiased = np.split(remove_camera_bias(np.concatenate([query, gallery]), cameras), [len(query)])
    expanded = {alpha: expand_queries(query, gallery, k=5, alpha=alpha) for alpha in (0, 3)}
    return {
        "as they are": our_ranking(case),
        "AQE (k=5)": our_ranking({**case, "query_embeddings": expanded[0]}),
        "alpha-QE (k=5, alpha=3)": our_ranking({**case, "query_embeddings": expanded[3]}),
        "without camera bias": our_ranking(
            {**case, "query_embeddings": unbiased[0], "gallery_embeddings": unbiased[1]}
        ),
        "re-ranked (20, 6, 0.3)": reranked_figures(case, rerank(query, gallery)),
        "re-ranked (50, 15, 0.3)": reranked_figures(case, rerank(query, gallery, 50, 15)),
        "without camera bias, re-ranked (20, 6, 0.3)": reranked_figures(case, rerank(*unbiased)),
    }


class QdrantEdge:
    """Qdrant's engine, set up as a server is that our collections are made on: HNSW with its own defaults."""

    def __init__(self, vectors: np.ndarray, folder: str):
        import qdrant_edge as edge

        self.edge = edge
        params = edge.EdgeVectorParams(size=vectors.shape[1], distance=edge.Distance.Cosine)
        graph = edge.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=10_000)
        # one graph of all, as large as it may be
        segments = edge.EdgeOptimizersConfig(default_segment_number=1, max_segment_size=10**8)
        self.shard = edge.EdgeShard.create(
            folder, edge.EdgeConfig(vectors=params, hnsw_config=graph, optimizers=segments)
        )
        for start in range(0, len(vectors), 2048):
            part = enumerate(vectors[start : start + 2048].tolist(), start)
            points = [edge.Point(number, vector, {}) for number, vector in part]
            self.shard.update(edge.UpdateOperation.upsert_points(points))
        self.shard.optimize()

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray]:
        """(queries, k) indices, as of the first of what our indices return."""
        edge, params = self.edge, self.edge.SearchParams(hnsw_ef=256)
        requests = [
            edge.QueryRequest(limit=k, query=edge.Query.Nearest(query), params=params) for query in queries.tolist()
        ]
        found = self.shard.query_batch(edge.QueryBatchRequest(requests))
        return (np.array([[point.id for point in points] for points in found]),)


def searched(kind: str, count: int, num_queries: int = 200, k: int = 10) -> dict[str, float]:
    """Seconds to build an index, milliseconds a query, and the share of the true nearest that it finds."""
    from personvit_hf.embedding import EmbeddingFolder
    from personvit_hf.search import ExactIndex, FaissIndex, open_index

    rng = np.random.default_rng(0)
    people = rng.normal(size=(max(1, count // 20), DIM)).astype(np.float32)
    vectors = np.empty((count, DIM), np.float32)
    for start in range(0, count, 2**16):  # in pieces, for the peak of memory
        part = vectors[start : start + 2**16]
        part[:] = people[rng.integers(0, len(people), len(part))] + 0.8 * rng.normal(size=part.shape)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    queries = vectors[rng.integers(0, count, num_queries)] + 0.03 * rng.normal(size=(num_queries, DIM))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    exact = ExactIndex(vectors, {})
    with tempfile.TemporaryDirectory() as path:
        start = time.perf_counter()
        folder = EmbeddingFolder(Path(path), {"weights": "drawn"}, vectors, np.arange(count), [], {})
        if kind == "qdrant":
            index = open_index(folder, kind, os.environ.get("QDRANT_URL"))
            while index.client.get_collection(index.name).status != "green":  # it builds its graph by and by
                time.sleep(1)
        elif kind == "qdrant-edge":
            index = QdrantEdge(vectors, path)
        else:
            index = exact if kind == "exact" else FaissIndex(folder, kind)
        built = time.perf_counter() - start
    times = []
    for batch in (1, num_queries):
        start = time.perf_counter()
        found = [index.search(queries[i : i + batch], k)[0] for i in range(0, min(num_queries, 20 * batch), batch)]
        times.append(1000 * (time.perf_counter() - start) / min(num_queries, 20 * batch))
    if kind == "qdrant":
        index.client.delete_collection(index.name)
    nearest = exact.search(queries, k)[0]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(found[0], nearest, strict=True)])
    return {"build_s": built, "ms_alone": times[0], "ms_in_200": times[1], "recall": float(recall)}


def held_mib(kind: str) -> float:
    """Main memory that this process holds ("VmRSS") or held at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(kind))) / 1024


def measure(work: Callable[[], Any], device: str) -> tuple[Any, dict[str, float]]:
    """(what it returns, seconds and MiB it took)."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        held_there = torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of drawing, is forgotten
    held = held_mib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    taken = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    taken["extra_mib"] = held_mib("VmHWM") - held
    if device == "cuda":
        taken["extra_gpu_mib"] = (torch.cuda.max_memory_allocated() - held_there) / 2**20
    return result, taken


def child(name: str, size: str, device: str) -> dict[str, Any]:
    """One measurement, by its name."""
    if name.startswith("search"):
        return searched(name.split()[1], int(name.split()[2]))
    case, small = draw(size), draw("market/2")
    if device == "cuda":
        case, small = on_gpu(case), on_gpu(small)
    if name == "options":
        return our_options(case)
    if name.startswith("reranking"):
        kind, *settings = name.split()[1:]
        k1, k2, lambda_value = int(settings[0]), int(settings[1]), float(settings[2])
        if kind == "plain":
            distances, taken = measure(lambda: plain_reranking(case, k1, k2, lambda_value), device)
        else:
            from personvit_hf import rerank

            query, gallery = case["query_embeddings"], case["gallery_embeddings"]
            distances, taken = measure(lambda: rerank(query, gallery, k1, k2, lambda_value), device)
        return {**taken, **reranked_figures(case, distances)}
    ranking = {"plain": plain_ranking, "cython": cython_ranking, "ours": our_ranking}[name.split()[1]]
    every = int(name.split()[2])
    our_ranking(small, 16)  # imports and threads are warm
    figures, taken = measure(lambda: ranking(case, every), device)
    return {**taken, **figures}


def in_turns(
    names: list[str], size: str, repeats: int, threads: int, device: str = "cpu", path: str | None = None
) -> dict[str, dict[str, float]]:
    """Medians of `repeats` fresh processes for each name, one after the other in turn."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([path, environment.get("PYTHONPATH", "")])
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            command = [sys.executable, __file__, "--child", name, "--size", size, "--device", device]
            process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results[name].append(json.loads(process.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }


def report(title: str, rows: dict[str, dict[str, float]], scale: dict[str, int] | None = None) -> None:
    """Prints a table and how many times less ours takes; times are multiplied by `scale`."""
    print(f"\n{title}\n\n| | CPU s | wall s | extra MiB | mAP | Rank-1 |\n|---|---|---|---|---|---|")
    times = {
        name: {key: row[key] * (scale or {}).get(name, 1) for key in ("cpu_s", "wall_s")} for name, row in rows.items()
    }
    for name, row in rows.items():
        there = f" ({row['extra_gpu_mib']:.0f} on the GPU)" if "extra_gpu_mib" in row else ""
        figures = f"{row['extra_mib']:.0f}{there} | {row['mAP']:.6f} | {row['rank1']:.6f}"
        print(f"| {name} | {times[name]['cpu_s']:.2f} | {times[name]['wall_s']:.2f} | {figures} |")
    ours = next(name for name in rows if "ours" in name)
    for name in rows:
        if name != ours:
            ratios = [times[name][key] / times[ours][key] for key in ("cpu_s", "wall_s")]
            print(f"{name} / {ours}: {ratios[0]:.1f} in CPU time, {ratios[1]:.1f} in wall time")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="ranking, reranking, options, search; default: the first three")
    parser.add_argument("--sizes", nargs="+", default=["market", "msmt17"], choices=["market", "msmt17"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where embeddings are")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each line at Market-1501's size")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="size of the gallery that is searched")
    indices = ["exact", "flat", "ivfpq", "hnsw", "qdrant"]
    parser.add_argument(
        "--indices", nargs="+", default=indices, help="what to search with, qdrant-edge too; the others if not given"
    )
    parser.add_argument("--fastreid", help="folder with fast-reid's built rank_cy module")
    parser.add_argument(
        "--dense", default="market/2", choices=["market", "market/2", "none"], help="size for dense re-ranking"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.size, args.device)))
        return
    parts = args.parts or ["ranking", "reranking", "options"]
    for size in args.sizes if "ranking" in parts else []:
        repeats, every = args.repeats if size == "market" else 1, EVERY[size]
        kinds = ["plain", *(["cython"] if args.fastreid else [])]
        names = [f"ranking {kind} {every}" for kind in kinds] + ["ranking ours 1"]
        rows = in_turns(names, size, repeats, 1, args.device, args.fastreid)
        title = f"Ranking, size of {size}, on {args.device}, 1 thread, median of {repeats}"
        if every > 1:
            title += f"; the others ran every {every}th query, and only their times are multiplied by {every}"
        report(title, rows, {name: every for name in names[:-1]})
    for settings in ("20 6 0.3", "50 15 0.3") if "reranking" in parts else ():
        kinds = {size: ["ours"] for size in args.sizes}
        if args.dense != "none":
            kinds[args.dense] = ["plain", "ours"]
        for size in kinds:
            rows = in_turns([f"reranking {kind} {settings}" for kind in kinds[size]], size, 1, 2, args.device)
            report(f"Re-ranking, size of {size}, on {args.device}, 2 threads", rows)
    if "options" in parts:
        print("\nOptions, size of market\n\n| | mAP | Rank-1 |\n|---|---|---|")
        command = [sys.executable, __file__, "--child", "options", "--size", "market"]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for name, figures in json.loads(output.splitlines()[-1]).items():
            print(f"| {name} | {figures['mAP']:.4f} | {figures['rank1']:.4f} |")
    if "search" in parts:
        print(f"\nSearch in {args.vectors:,} x {DIM}, 2 threads\n")
        print("| | build s | ms/query, alone | ms/query, 200 at once | recall@10 |\n|---|---|---|---|---|")
        for kind in args.indices:
            row = in_turns([f"search {kind} {args.vectors}"], "market", 1, 2).popitem()[1]
            times = f"{row['build_s']:.1f} | {row['ms_alone']:.2f} | {row['ms_in_200']:.2f}"
            print(f"| {kind} | {times} | {row['recall']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
