"""How are rows told to TensorBoard? As records of an event file.

The records are TFRecords (length, its checksum, data, its checksum; TensorFlow's record_writer.cc) of `Event`
messages. Written here and not by tensorboardX's writer, whose thread ends at a full disk and takes the run
with it.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any


def file_name() -> str:
    """Returns a name that TensorBoard knows for an event file, of this process alone."""
    return f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}'


def beginning(step: int) -> bytes:
    """Returns the first records of a run that goes on from `step`: later steps of earlier files are void."""
    from tensorboardX.proto import event_pb2

    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return _record(file_version='brain.Event:2') + _record(step=step + 1, session_log=start)


def of_row(row: dict[str, Any]) -> bytes:
    """Returns a record with the finite numbers of a row of metrics, named `SPLIT/NAME`."""
    from tensorboardX.proto import summary_pb2

    values = [
        summary_pb2.Summary.Value(tag=f'{row["split"]}/{name}', simple_value=value)
        for name, value in row.items()
        if name not in ('split', 'step') and math.isfinite(value)
    ]
    return _record(step=row['step'], summary=summary_pb2.Summary(value=values))


def _record(**fields: Any) -> bytes:
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack('<Q', len(data))
    return b''.join(
        [length, struct.pack('<I', masked_crc32c(length)), data, struct.pack('<I', masked_crc32c(data))]
    )


def read(path: Path) -> list[Any]:
    """Returns the `Event` messages of a file (without looking at their checksums)."""
    from tensorboardX.proto import event_pb2

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack('<Q', content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found
