"""The parts list (SBOM, CycloneDX 1.5) of what is installed beside this Python: `python .ci/sbom.py > sbom.json`."""
import json
from base64 import urlsafe_b64decode
from importlib.metadata import distributions


def licence_of(about):
    "The licence of a distribution, from its metadata."
    named = about.get("License-Expression") or next(
        (line.rsplit(" :: ", 1)[1] for line in about.get_all("Classifier") or [] if line.startswith("License :: OSI")), None)
    return [{"license": {"name": named}}] if named else []


def record_hash(package):
    "SHA-256 of a package's own metadata file as its RECORD lists it, in hexadecimal digits; None without a RECORD."
    for file in package.files or []:
        if file.name == "METADATA" and file.hash and file.hash.mode == "sha256":
            return urlsafe_b64decode(file.hash.value + "=").hex()


def component(package):
    "One installed distribution as CycloneDX describes a component."
    about, digest = package.metadata, record_hash(package)
    name = about["Name"].lower().replace("_", "-")
    return {"type": "library", "bom-ref": f"pkg:pypi/{name}@{package.version}", "name": about["Name"], "version": package.version,
            "purl": f"pkg:pypi/{name}@{package.version}", "licenses": licence_of(about),
            "properties": [{"name": "sha256 of METADATA", "value": digest}] if digest else []}


def bill():
    "The whole list, in alphabetical order, without times or machine names: equal environments give equal files."
    parts = {part["bom-ref"]: part for part in map(component, distributions())}
    own = [parts.pop(ref) for ref in list(parts) if ref.startswith("pkg:pypi/medvlm3d@")]
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": {"component": own[0]} if own else {},
            "components": [parts[ref] for ref in sorted(parts)]}


if __name__ == "__main__": print(json.dumps(bill(), indent=1))
