"""Twelve small scans with written reports, and a language model of no size that can write any text."""
import numpy as np

import medvlm3d  # noqa: F401  first: it lets torchvision stand beside a CPU torch

ORGANS = ("liver", "spleen", "left kidney", "right lower lobe", "pancreatic tail", "gallbladder")
SEGMENTS = ("segment II", "segment IVb", "segments V and VI", "segment VIII", "the dome", "segment VII")
REPORTS = (
    "Clinical question: {age}-year-old, weight loss.\n\nFindings: In {segment} of the {organ} there is a hypodense, "
    "sharply bordered lesion of {a} x {b} mm without enhancement. No further focal lesion. The portal vein is patent.\n\n"
    "Assessment: Most likely a simple cyst. No evidence of metastases.",
    "The {organ} is enlarged ({a} mm in long axis). Within it lies an ill-defined mass measuring {b} mm, partly necrotic, "
    "with infiltration of the adjacent fat.\n\nSmall bilateral pleural effusions. No pneumothorax, no free air.\n\n"
    "In summary: suspicious mass of the {organ}; biopsy is recommended. Follow-up in {weeks} weeks.",
    "Comparison: none.\n\nUnremarkable {organ}. No calcification, no abscess. Two nodules of {a} and {b} mm in the left upper "
    "lobe, unchanged.\n\nConclusion: 1. Stable nodules. 2. No acute finding in the abdomen (incl. {segment}).",
    "Status post resection in {segment}. At the margin there is a new ring-enhancing lesion, {a} mm, and next to it a "
    "second one of {b} mm.\n\nAscites is not seen; lymph nodes up to {weeks} mm are not enlarged.\n\n"
    "Opinion: recurrence in the {organ} cannot be excluded.")


def report(n):
    "The n-th report: three paragraphs, several findings, sizes and negations."
    place = dict(organ=ORGANS[n % 6], segment=SEGMENTS[(n * 5 + 1) % 6])
    return REPORTS[n % 4].format(**place, a=7 + 3 * n, b=5 + 2 * n, age=41 + 3 * n, weeks=4 + n) + "\n"


def write_scans(root, count=12, patients=11):
    "Scans, three of four in HU, one folder a patient, a lesion in each; the first patient has two."
    import nibabel as nib
    for n in range(count):
        rng = np.random.default_rng(n)
        voxels = np.full((28, 26, 14), -1000.)
        voxels[4:24, 4:22] = rng.normal(50, 12, (20, 18, 14))
        x, y, z = rng.integers(6, 18, 2).tolist() + [int(rng.integers(2, 10))]
        voxels[x:x + 5, y:y + 4, z:z + 3] = 10 + 25 * (n % 3)
        if n % 4 == 3: voxels += 1024    # as some archives store it: nothing says that this is CT
        folder = root/f"patient {n % patients:02}"
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([2.5, 2.5, 5., 1.])), folder/f"ct {n:02}.nii.gz")
        (folder/f"ct {n:02}.txt").write_text(report(n), encoding="utf-8")
    return root


def write_llm(folder):
    "A folder as one downloads it: a LLaMA of two small layers with random weights, and a tokenizer of bytes."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
