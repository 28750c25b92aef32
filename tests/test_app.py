"""The HTTP service of `medvlm3d app`: what visitors send and ask, what they may not, and what is left of it."""
import base64
import json
import threading
import time

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from scan_files import save_dicom
from starlette.testclient import TestClient

from medvlm3d import fetch, tiny
from medvlm3d.front.routes import Desk, ENTRIES, make_app
from medvlm3d.front.service import Models
from medvlm3d.front.visits import Limits, Visits

NAME = "Meier^Hans"


@pytest.fixture
def desk(tmp_path):
    "A desk with a small random model, whose limits are low."
    models = Models({"tiny": tmp_path/"tiny"}, "cpu")
    tiny().save_pretrained(tmp_path/"tiny")
    limits = Limits(bytes=3_000_000, files=40, voxels=2_000_000, scans=2, visits=3, idle=100)
    yield Desk(models, Visits(limits, tmp_path))


@pytest.fixture
def client(desk):
    with TestClient(make_app(desk), base_url="http://127.0.0.1:8765") as client: yield client


def begin(client):
    return {"Authorization": f"Bearer {client.post('/visits').json()['visit']}"}


def nifti(path, seed=0):
    values = np.random.default_rng(seed).normal(0, 200, (24, 20, 10)).astype("f4")
    nib.save(nib.Nifti1Image(values, np.diag([-2., -2., 5., 1.])), path)
    return path.read_bytes()


def opened(client, me, tmp_path, **options):
    sent = client.put("/files/scan.nii", content=nifti(tmp_path/"scan.nii"), headers=me)
    assert sent.status_code == 200, sent.text
    reply = client.post("/volumes", json=options, headers=me)
    assert reply.status_code == 200, reply.text
    return reply.json()


def files_of(desk):
    return [p for p in desk.visits.folder.rglob("*") if p.is_file()]


def reason(reply, status):
    assert reply.status_code == status, reply.text
    return reply.json()["error"]["message"]


# --- scans ----------------------------------------------------------------------------------------------------------

def test_a_folder_of_dicom_is_read_and_its_files_and_names_are_gone(client, desk, tmp_path, capfd):
    "Subfolders and equal names are kept apart; no reply and no log holds the patient's name."
    stack = np.random.default_rng(0).integers(0, 900, (6, 16, 16)).astype(np.int16)
    save_dicom(tmp_path/"ct", stack, np.diag([2., 2., 2., 1.]), PatientName=NAME)
    me = begin(client)
    for file in sorted((tmp_path/"ct").iterdir()):
        assert client.put(f"/files/{NAME}/{file.name}", content=file.read_bytes(), headers=me).status_code == 200
    scan = client.post("/volumes", headers=me).json()
    assert scan["modality"] == "CT" and sorted(scan["shape"]) == [6, 16, 16] and not files_of(desk)
    answer = client.post("/answers", json={"volume": scan["id"]}, headers=me)
    assert answer.status_code == 200
    said = json.dumps(scan) + answer.text + "".join(capfd.readouterr())
    assert "Meier" not in said and "Hans" not in said


def test_a_zip_of_a_series_is_read(client, tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path/"x.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for file in sorted(fetch("brain-mr-dicom").glob("*.dcm"))[:5]: z.write(file, f"a/{file.name}")
    me = begin(client)
    client.put("/files/x.zip", content=(tmp_path/"x.zip").read_bytes(), headers=me)
    scan = client.post("/volumes", headers=me).json()
    assert scan["modality"] == "MR" and scan["shape"][0] == 5


def test_an_upload_that_lies_gets_the_readers_reason(client, desk, tmp_path):
    "Damaged, too large a declared size, another kind, nothing: a reason, no path of this machine, and the next scan is read."
    me = begin(client)
    header = bytearray(nifti(tmp_path/"a.nii")[:352])
    header[42:48] = np.array([2000, 2000, 2000], "<i2").tobytes()
    for data, words in [(b"\x1f\x8bno scan", "damaged"), (bytes(header), "voxels, the limit is"), (b"hello" * 100, "not")]:
        client.delete("/files", headers=me)
        client.put("/files/scan.nii.gz", content=data, headers=me)
        text = reason(client.post("/volumes", headers=me), 400)
        assert str(desk.visits.folder) not in text and "scan.nii" in text, text
        if words != "not": assert words in text
    client.delete("/files", headers=me)
    assert "was not sent" in reason(client.post("/volumes", headers=me), 400)
    assert opened(client, me, tmp_path)["id"]


def test_limits_on_bytes_files_and_visits(client, desk, tmp_path):
    me = begin(client)
    assert "larger than 3 MB" in reason(client.put("/files/big", content=b"x" * 3_100_000, headers=me), 413)
    assert not files_of(desk)
    for i in range(39): client.put(f"/files/{i}", content=b"x", headers=me)
    assert "more than 40 files" in reason(client.put("/files/last", content=b"x", headers=me), 413)
    begin(client), begin(client)
    assert "3 visitors already" in reason(client.post("/visits"), 429)
    assert reason(client.post("/answers", content=b"x" * 2**21, headers=me), 413)


@pytest.mark.parametrize("name", ["../x.nii", "a/../../x.nii", "%2e%2e/x.nii", "a%00b", "..%5c..%5cx.nii"])
def test_a_name_leads_nowhere_else(client, desk, tmp_path, name):
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    reply = client.put(f"/files/{name}", content=b"x", headers=begin(client))
    assert reply.status_code in (400, 404) and {p for p in tmp_path.rglob("*") if p.is_file()} == before


# --- answers --------------------------------------------------------------------------------------------------------

def test_an_answer_is_that_of_the_library(client, desk, tmp_path):
    "With the same model and scan; its heat lies on the scan's grid, and its kept slices have pictures."
    from medvlm3d import read_volume
    me = begin(client)
    scan = opened(client, me, tmp_path, modality="CT", intensity="HU")
    asked = {"volume": scan["id"], "question": "Which organ?", "choices": ["liver", "spleen"]}
    answer = client.post("/answers", json=asked, headers=me).json()
    volume = read_volume(tmp_path/"scan.nii", modality="CT", intensity="HU")
    alone = desk.models.loaded["tiny"].ask(volume, "Which organ?", ["liver", "spleen"])
    assert (answer["text"], answer["letter"]) == (alone.text, alone.letter) and answer["warnings"] == list(alone.outside)
    assert answer["probabilities"] == pytest.approx(alone.probabilities, abs=1e-4)
    view, heat = (nib.Nifti1Image.from_bytes(client.get(url, headers=me).content) for url in
                  (f"/volumes/{scan['id']}/view.nii", f"/answers/{answer['id']}/heat.nii"))
    assert view.shape == heat.shape and np.allclose(view.affine, heat.affine) and heat.get_fdata().max() == 100
    stored = nib.load(tmp_path/"scan.nii")
    voxel = np.linalg.inv(view.affine) @ stored.affine @ [3, 4, 5, 1]
    assert view.get_fdata()[tuple(voxel[:3].round().astype(int))] == pytest.approx(stored.get_fdata()[3, 4, 5])
    kept = client.get(f"/volumes/{scan['id']}/kept", headers=me).json()["kept"]
    assert kept == answer["kept"] and len(kept) == 4
    assert client.get(f"/volumes/{scan['id']}/kept/3", headers=me).content.startswith(b"\x89PNG")
    assert client.get(f"/volumes/{scan['id']}/kept/4", headers=me).status_code == 404
    assert "Research use only" in answer["notice"]


def test_words_come_one_by_one(client, tmp_path):
    me = begin(client)
    scan = opened(client, me, tmp_path)
    body = {"volume": scan["id"], "max_new_tokens": 6}
    whole = client.post("/answers", json=body, headers=me).json()
    with client.stream("POST", "/answers", json={**body, "stream": True}, headers=me) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        found = [json.loads(line[6:]) for line in reply.iter_lines() if line]
    words = [event["words"] for event in found if "words" in event]
    assert len(words) > 2 and "".join(words) == found[-1]["answer"]["text"] == whole["text"]


def test_another_rule_and_share_are_used_and_said(client, desk, tmp_path):
    me = begin(client)
    scan = opened(client, me, tmp_path)
    asked = {"volume": scan["id"], "question": "Which organ?", "max_new_tokens": 3, "selection": "uniform", "rho": 25}
    answer = client.post("/answers", json=asked, headers=me).json()
    assert len(answer["kept"]) == 2 and answer["selection"] == "uniform" and answer["rho"] == 25
    assert any("the model was trained with" in text for text in answer["warnings"])
    plain = client.post("/answers", json={"volume": scan["id"], "max_new_tokens": 3}, headers=me).json()
    assert plain["rho"] == 50 and len(plain["kept"]) == 4


@pytest.mark.parametrize("body, words", [
    ({"question": "?"}, "volume"), ({"volume": "x", "tempreature": 1}, "tempreature"), ({"volume": "x", "rho": "many"}, "rho"),
    ({"volume": "x", "max_new_tokens": 10**9}, "max_new_tokens"), ({"volume": "x", "choices": ["a"]}, "choices"), ([1], "object")])
def test_a_request_that_means_nothing_is_refused_by_name(client, body, words):
    assert words in reason(client.post("/answers", json=body, headers=begin(client)), 400)


def test_json_that_is_none(client):
    assert "is no JSON" in reason(client.post("/answers", content=b"[" * 100_000, headers=begin(client)), 400)


# --- visitors -------------------------------------------------------------------------------------------------------

def test_a_visit_sees_nothing_of_another_and_ends_with_all_it_had(client, desk, tmp_path):
    me, you = begin(client), begin(client)
    scan = opened(client, me, tmp_path)
    answer = client.post("/answers", json={"volume": scan["id"], "max_new_tokens": 2}, headers=me).json()
    for headers in (you, {}, {"Authorization": "Bearer x"}):
        for url in (f"/volumes/{scan['id']}/view.nii", f"/volumes/{scan['id']}/kept", f"/answers/{answer['id']}/heat.nii"):
            assert reason(client.get(url, headers=headers), 404)
        assert reason(client.post("/answers", json={"volume": scan["id"]}, headers=headers), 404)
        assert reason(client.delete(f"/volumes/{scan['id']}", headers=headers), 404)
    client.put("/files/left.nii", content=b"x", headers=me)
    assert client.delete("/visits", headers=me).status_code == 200
    assert not files_of(desk) and reason(client.get(f"/volumes/{scan['id']}/kept", headers=me), 404)


def test_two_visitors_ask_at_once(client, desk, tmp_path):
    "Each gets the answer about the own scan, the same as alone."
    asked, scans = {"question": "Where is the lesion?", "max_new_tokens": 6}, []
    for seed in (1, 2):
        me = begin(client)
        client.put("/files/scan.nii", content=nifti(tmp_path/"scan.nii", seed), headers=me)
        scans.append((me, client.post("/volumes", headers=me).json()["id"]))

    def ask(me, scan, out): out.append(client.post("/answers", json={**asked, "volume": scan}, headers=me).json()["text"])
    alone = []
    for me, scan in scans: ask(me, scan, alone)
    together = [[], []]
    threads = [threading.Thread(target=ask, args=(me, scan, out)) for (me, scan), out in zip(scans, together) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert together == [[alone[0]] * 3, [alone[1]] * 3]


def test_an_idle_visit_ends_and_so_does_everything_with_the_process(desk, tmp_path):
    with TestClient(make_app(desk), base_url="http://127.0.0.1:8765") as client:
        me = begin(client)
        opened(client, me, tmp_path)
        desk.visits.sweep(time.monotonic() + 101)
        assert "has ended" in reason(client.get("/visits", headers=me), 404)
        client.put("/files/x", content=b"x", headers=begin(client))
    assert not desk.visits.folder.exists()


def test_pages_of_other_sites_and_other_names_of_this_machine_are_refused(client):
    for headers in ({"Host": "rebound.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert client.post("/visits", headers=headers).status_code == 400
    assert client.post("/visits", headers={"Origin": "http://127.0.0.1:8765"}).status_code == 200


# --- the page and the description -----------------------------------------------------------------------------------

def test_the_page_loads_nothing_from_elsewhere(client):
    "No address of another host stands in its files, and the browser is told to load none."
    texts = [client.get(name).text for name in ("/", "/page.css", "/page.js", "/service")]
    assert not any("://" in text or 'src="//' in text for text in texts)
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "Research use only" in page.text
    assert "set-cookie" not in page.headers


def test_controls_have_labels():
    import re
    html = (ROOT/"medvlm3d/front/page/index.html").read_text()
    ids = set(re.findall(r'<(?:input|select|textarea)[^>]*\bid="([\w-]+)"', html))
    inside = set(re.findall(r'<label[^>]*>[^<]*<(?:input|select)[^>]*\bid="([\w-]+)"', html))
    assert ids == inside | set(re.findall(r'for="([\w-]+)"', html)) and len(ids) > 20


def test_the_rules_of_the_page_are_those_of_the_library():
    from medvlm3d.method.selection import STRATEGIES
    script = (ROOT/"medvlm3d/front/page/page.js").read_text()
    assert f"const RULES = {json.dumps(list(STRATEGIES))};" in script


def test_the_description_names_every_route_and_its_fields(client):
    made = client.get("/openapi.json").json()
    listed = {(method.upper(), path) for path, methods in made["paths"].items() for method in methods}
    assert len(listed) == len(ENTRIES) and made["openapi"].startswith("3.1")
    for method, path in listed:
        reply = client.request(method, path.replace("{", "").replace("}", "").replace("kept/k", "kept/0"))
        assert reply.status_code != 405 and reply.text != "Not Found", (method, path)


# --- chat programs --------------------------------------------------------------------------------------------------

def talk(client, headers, url, **more):
    parts = [{"type": "text", "text": "Which organ?"}, {"type": "image_url", "image_url": {"url": url}}]
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": parts}], **more}, headers=headers)


def test_a_chat_about_a_file_in_its_own_address(client, desk, tmp_path):
    "Without a visit; the file is gone afterwards."
    url = f"data:;name=scan.nii;base64,{base64.b64encode(nifti(tmp_path/'scan.nii')).decode()}"
    said = talk(client, {}, url, max_tokens=4).json()
    assert said["object"] == "chat.completion" and said["choices"][0]["finish_reason"] in ("stop", "length")
    assert said["choices"][0]["message"]["content"] == said["medvlm3d"]["text"] and not files_of(desk)
    chunks = [line[6:] for line in talk(client, {}, url, max_tokens=4, stream=True).text.splitlines() if line]
    told = "".join(json.loads(c)["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert chunks[-1] == "[DONE]" and told == said["choices"][0]["message"]["content"]


def test_a_chat_about_an_opened_scan_and_its_refusals(client, tmp_path):
    me = begin(client)
    url = f"volume:{opened(client, me, tmp_path)['id']}"
    assert talk(client, me, url, choices=["liver", "spleen"]).json()["choices"][0]["message"]["content"] in ("liver", "spleen")
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    for address, more, words in [("https://example.org/x.nii", {}, "not read"), ("file:///etc/passwd", {}, "not read"),
                                 (url, {"temperature": 1}, "temperature"),
                                 (url, {"tools": []}, "tools"), (url, {"model": "gpt"}, "gpt"), ("data:;base64,*", {}, "damaged")]:
        assert words in reason(talk(client, me, address, **more), 400)
    assert reason(talk(client, {}, url), 404)
