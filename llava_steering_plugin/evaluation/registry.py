"""List the benchmarks that `llava-steering score` knows."""

from __future__ import annotations

from llava_steering_plugin.errors import ArgumentsError, nearest
from llava_steering_plugin.evaluation.benchmark import Benchmark
from llava_steering_plugin.evaluation.scores import (
    captions,
    exact_match,
    judged,
    labels,
    letters,
    mme,
    mmmu,
    own_data,
    vqa_accuracy,
    yes_no,
)

_SPLIT = frozenset({"split"})

BENCHMARKS = {
    "vqav2": Benchmark(
        "v2_mscoco_val2014_annotations.json; for the test server v2_OpenEnded_mscoco_test2015_questions.json",
        vqa_accuracy.read_vqa,
        vqa_accuracy.vqa_metrics,
        vqa_accuracy.vqa_submission,
        points=vqa_accuracy.vqa_points,
    ),
    "okvqa": Benchmark(
        "mscoco_val2014_annotations.json",
        vqa_accuracy.read_vqa,
        vqa_accuracy.vqa_metrics,
        points=vqa_accuracy.vqa_points,
    ),
    "textvqa": Benchmark(
        "TextVQA_0.5.1_val.json; TextVQA_0.5.1_test.json for the test server",
        vqa_accuracy.read_textvqa,
        vqa_accuracy.textvqa_metrics,
        vqa_accuracy.vqa_submission,
        shared_ids=True,
        points=vqa_accuracy.textvqa_points,
    ),
    "vizwiz": Benchmark(
        "val.json; test.json for the test server",
        vqa_accuracy.read_vizwiz,
        vqa_accuracy.vizwiz_metrics,
        vqa_accuracy.vizwiz_submission,
        points=vqa_accuracy.vizwiz_points,
    ),
    "gqa": Benchmark(
        "testdev_balanced_questions.json",
        exact_match.read_gqa,
        exact_match.gqa_metrics,
        exact_match.gqa_submission,
        points=exact_match.gqa_points,
    ),
    "scienceqa": Benchmark(
        "the folder of problems.json and pid_splits.json",
        letters.read_scienceqa,
        letters.letter_metrics,
        options=_SPLIT,
        points=letters.letter_points,
    ),
    "scienceqa_img": Benchmark(
        "the same; only problems with an image",
        letters.read_scienceqa_img,
        letters.letter_metrics,
        options=_SPLIT,
        points=letters.letter_points,
    ),
    "iconqa_text": Benchmark(
        "the folder of problems.json and pid_splits.json",
        exact_match.read_iconqa_text,
        exact_match.iconqa_metrics,
        options=_SPLIT,
        points=exact_match.iconqa_points,
    ),
    "iconqa_blank": Benchmark(
        "the folder of problems.json and pid_splits.json",
        exact_match.read_iconqa_blank,
        exact_match.iconqa_metrics,
        options=_SPLIT,
        points=exact_match.iconqa_points,
    ),
    "pope": Benchmark(
        "the folder of coco_pope_SPLIT.json",
        yes_no.read_pope,
        yes_no.pope_metrics,
        options=frozenset({"questions"}),
        points=yes_no.pope_points,
    ),
    "mme": Benchmark(
        "the folder MME_Benchmark_release_version",
        mme.read_mme,
        mme.mme_metrics,
        shared_ids=True,
        points=mme.mme_points,
    ),
    "flickr30k": Benchmark(
        "dataset_flickr30k.json",
        captions.read_flickr30k,
        captions.caption_metrics,
        options=_SPLIT,
        points=captions.cider_points,
        mean_of_points="cider",
    ),
    "mmmu": Benchmark(
        "answer_dict_val.json, or a folder of SUBJECT/output.json",
        mmmu.read_mmmu,
        mmmu.mmmu_metrics,
        points=mmmu.mmmu_points,
    ),
    "mmvet": Benchmark("mm-vet.json", judged.read_mmvet, None, judged.mmvet_submission),
    "hallusionbench": Benchmark(
        "HallusionBench.json", judged.read_hallusionbench, None, judged.hallusionbench_submission
    ),
    "vsr": Benchmark("test.jsonl", labels.read_vsr, labels.statement_metrics, points=labels.statement_points),
    "snli_ve": Benchmark("snli_ve_test.jsonl", labels.read_snli_ve, labels.label_metrics, points=labels.label_points),
    "cifar10": Benchmark(
        "the folder of test_batch.bin and batches.meta.txt",
        labels.read_cifar10,
        labels.label_metrics,
        points=labels.label_points,
    ),
    "cifar100": Benchmark(
        "the folder of test.bin and fine_label_names.txt",
        labels.read_cifar100,
        labels.label_metrics,
        points=labels.label_points,
    ),
    "mnist": Benchmark(
        "t10k-labels-idx1-ubyte, or the same with .gz",
        labels.read_mnist,
        labels.digit_metrics,
        points=labels.digit_points,
    ),
    "hellaswag": Benchmark(
        "hellaswag_val.jsonl", letters.read_hellaswag, letters.letter_metrics, points=letters.letter_points
    ),
    "mmlu": Benchmark(
        "the folder of SUBJECT_test.csv",
        letters.read_mmlu,
        letters.letter_metrics,
        options=_SPLIT,
        points=letters.letter_points,
    ),
    "vision_flan": Benchmark(
        "samples in LLaVA's layout, with task_name",
        exact_match.read_vision_flan,
        exact_match.vision_flan_metrics,
        remarks=exact_match.without_rouge,
        points=exact_match.vision_flan_points,
    ),
    "exact_match": Benchmark(
        "your own data: LLaVA's JSON, or a question file whose lines have an answer",
        own_data.read_own,
        own_data.own_metrics,
        points=own_data.own_points,
    ),
}


def benchmark_of(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        ArgumentsError: there is none.
    """
    if name not in BENCHMARKS:
        hint = nearest(name, BENCHMARKS)
        raise ArgumentsError(f"there is no benchmark {name!r}: {hint}known: {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]
