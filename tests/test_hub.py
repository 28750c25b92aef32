"""What users of transformers say arrives, or is refused by name; what goes to the hub comes back as the same model."""
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from medvlm3d.base.core import MedVLM3DError
from medvlm3d.method.model import MedVLM3D, tiny
from medvlm3d.method.seen import Seen


@pytest.fixture
def hub():
    "(address, files received) of a stand-in for the hub that listens on this machine only."
    files = {}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_): "Nothing is printed."

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = json.dumps(self.answer(body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def answer(self, body):
            if self.path.endswith("/repos/create"): return {"url": f"{address}/doctor/tiny", "id": "doctor/tiny"}
            if self.path.endswith("/validate-yaml"): return {"errors": [], "warnings": []}
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                return {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            files.update({value["path"]: base64.b64decode(value["content"]) for value in values})
            return {"commitUrl": f"{address}/doctor/tiny/commit/1", "commitOid": "1", "hookOutput": ""}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield address, files
    server.shutdown()


def test_what_is_pushed_comes_back(hub, tmp_path):
    address, files = hub
    model = tiny()
    model.seen = Seen(3, "three phantoms", modalities={"CT": 3})
    commit = model.push_to_hub("doctor/tiny", token="none", endpoint=address)
    assert commit == f"{address}/doctor/tiny/commit/1"
    for name, content in files.items(): (tmp_path/name).write_bytes(content)
    again = MedVLM3D.from_pretrained(tmp_path)
    for name, t in model.state_dict().items(): assert torch.equal(t, again.state_dict()[name]), name
    card = files["README.md"].decode()
    for part in ("## Data", "3 of CT", "## Intended use", "## Limits", "## Scores", "Not evaluated"):
        assert part in card


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder/"inner")
    return folder


def test_settings_of_loading_arrive(saved, monkeypatch):
    assert MedVLM3D.from_pretrained(saved, subfolder="inner", dtype="float16").dtype == torch.float16
    asked = {}
    def download(name, **options):
        asked.update(options, name=name)
        return str(saved)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub = dict(revision="v1", token="none", cache_dir="cache")
    MedVLM3D.from_pretrained("doctor/tiny", subfolder="inner", **hub)
    assert {**hub, "name": "doctor/tiny"}.items() <= asked.items()


@pytest.mark.parametrize("word", ["device_map", "quantization_config", "variant"])
def test_settings_of_loading_are_refused(saved, word):
    with pytest.raises(MedVLM3DError, match=word): MedVLM3D.from_pretrained(saved/"inner", **{word: "auto"})


@pytest.mark.parametrize("word", ["max_shard_size", "push_to_hub", "variant"])
def test_settings_of_saving_are_refused(tmp_path, word):
    with pytest.raises(MedVLM3DError, match=word): tiny().save_pretrained(tmp_path, **{word: "1GB"})


def test_table_grows_and_labels_may_be_the_ids():
    model = tiny()
    inputs = model.processor(torch.rand(8, 64, 64), "Where is the lesion?")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert torch.isfinite(loss)
    model.resize_token_embeddings(128)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == 128
    assert model(**inputs).logits.shape[-1] == 128


@pytest.fixture(scope="module")
def asked():
    "(model, one chat about a scan)."
    scan = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(1))
    content = [{"type": "image", "image": scan}, {"type": "text", "text": "Where is the lesion?"}]
    return tiny(), [{"role": "user", "content": content}]


def test_pipeline_from_a_folder_says_what_the_model_says(asked, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin, pipeline
    model, chat = asked
    model.save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), ProcessorMixin)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MedVLM3D
    inputs = model.processor.apply_chat_template(chat, tokenize=True)
    ids = model.generate(**inputs, max_new_tokens=5)
    answer = model.processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:])
    ask = pipeline("image-text-to-text", model=str(tmp_path))
    said = ask(text=[chat, chat], max_new_tokens=5, return_full_text=False)
    assert [one[0]["generated_text"].strip() for one in said] == answer * 2


def test_processor_refuses_what_it_would_not_do(asked):
    model, chat = asked
    words = model.processor.apply_chat_template(chat)
    assert words.count("<image>") == model.config.visual_tokens and words.endswith("Where is the lesion?")
    for call in (lambda: model.processor.apply_chat_template(chat * 2), lambda: model.processor(text="Where?", truncation=True),
                 lambda: model.processor(prompts="Where?", text="Where?"), lambda: model.processor(text="Where?", return_tensors="np")):
        with pytest.raises(MedVLM3DError): call()
