"""The COCO document of a run over many images, from which the run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping

from detrkit.common.errors import DetrkitError
from detrkit.common.files import read_json, write_text
from detrkit.common.schema import JsonObject
from detrkit.results.journal import Journal, match_results
from detrkit.results.positions import is_frame
from detrkit.results.record import Record, is_entry, listed_classes


class CocoOutput(Record):
    """A record beside a COCO document; the document of a complete run is a record too."""

    def is_complete(self) -> bool:
        """Whether the document of an earlier run contains just these images and has no journal to continue.

        Raises:
            DetrkitError: The file is not a COCO document of such a run, or was made with other settings.
        """
        if self.journal is None or self.journal.exists():
            return False
        entries = self._finished(self.journal)
        earlier = ((entry, entry) for entry in entries)
        found, others = match_results(earlier, self._positions(), self.fingerprint)
        # How many frames a video has shows at its end only.
        same_ids = all(
            not is_frame(position) and entry["image"]["id"] == self._ids[position]
            for position, entry in found.items()
        )
        return bool(entries) and same_ids and not others and len(found) == len(self._ids)

    def _finished(self, journal: Journal) -> list[JsonObject]:
        """The entries of a finished document; none if there is no file."""
        if not self._file.is_file() or not self._file.stat().st_size:
            return []
        remedy = "start from scratch without --resume"
        document = read_json(self._file, remedy=remedy)
        try:
            journal.check(document["info"], self._file)
            entries = {
                image["id"]: {"image": image, "annotations": [], "fingerprint": found}
                for image, found in zip(document["images"], document["info"]["fingerprints"], strict=True)
            }
            for annotation in document["annotations"]:
                entries[annotation["image_id"]]["annotations"].append(annotation)
            if not all(map(is_entry, entries.values())):
                raise ValueError("an entry is damaged")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DetrkitError(
                f"cannot resume: {self._file} is not a document of detrkit detect; {remedy}"
            ) from error
        return list(entries.values())

    def write(self, names: Mapping[int, str], positions: Collection[int] | None = None) -> None:
        """Writes the document.

        Args:
            names: Label -> class name of the model.
            positions: Positions of the images to list; None for all that have a result.

        Raises:
            DetrkitError: The file cannot be written.
        """
        write_text(coco_parts(self, names, self.done if positions is None else positions), self._file)

    def document(self, names: Mapping[int, str]) -> dict[str, object]:
        """The document itself, as :meth:`write` writes it."""
        return dict(json.loads("".join(coco_parts(self, names, self.done))))


def coco_parts(record: Record, names: Mapping[int, str], positions: Collection[int]) -> Iterator[str]:
    """The text of a COCO document, with the images in the order in which they were named.

    Args:
        record: What was found.
        names: Label -> class name of the model. Those that COCO left unused ("N/A") are only listed if
            objects of them were found.
        positions: Positions of the images to list.
    """
    separator = ""
    if record.info:
        info = {**record.info, "fingerprints": [record.fingerprint(i) for i in record.in_order(positions)]}
        yield f'{{"info": {json.dumps(info)}, "images": ['
    else:
        yield '{"images": ['
    for entry in record.entries(positions):
        yield separator + json.dumps(entry["image"])
        separator = ", "
    number, separator = 0, ""
    used = set()
    yield "], "
    if videos := record.video_entries(positions):
        yield f'"videos": {json.dumps(videos)}, '
    yield '"annotations": ['
    for entry in record.entries(positions):
        for annotation in entry["annotations"]:
            number += 1
            used.add(annotation["category_id"])
            yield separator + json.dumps({**annotation, "id": number, "image_id": entry["image"]["id"]})
            separator = ", "
    categories = [{"id": label, "name": name} for label, name in listed_classes(names, used).items()]
    yield f'], "categories": {json.dumps(categories)}}}\n'
