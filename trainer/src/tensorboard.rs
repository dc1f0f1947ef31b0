//! TensorBoard events: the metrics of each step as scalars, in a file that TensorBoard reads.
//!
//! The file is a chain of records (TFRecord): length as little-endian u64, masked CRC-32C of the length,
//! bytes, masked CRC-32C of the bytes. Each record is a protocol buffer `Event`; of its fields these
//! are written: `wall_time` (1, double), `step` (2, int64), `file_version` (3, string; first record
//! only) and `summary` (5), which holds one `Value` (1) a metric with `tag` (1, string) and
//! `simple_value` (2, float). Leaves out histograms, text and graphs. Values that are not finite are
//! left out too: TensorBoard draws none.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::metrics::{Metrics, name};

/// The folder of a run that TensorBoard is pointed at, and the one file in it.
const FILE: [&str; 2] = ["tensorboard", "events.out.tfevents.1.engine"];

/// What a reader of the second version of the format expects in the first record.
const VERSION: &str = "brain.Event:2";

/// Bytes of a record around its content.
const HEAD: usize = 12;
const TAIL: usize = 4;

/// Appends to the event file of a run, one flushed record a step.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new file in `run`, in place of one that may be there.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(run: &Path) -> Result<Self> {
        let dir = run.join(FILE[0]);
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        let path = dir.join(FILE[1]);
        let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
        let mut writer = Self { path, file };
        writer.append(&version_event(now()))?;
        Ok(writer)
    }

    /// Continues the file in `run` after `step`: records of later steps, and what a crash cut short,
    /// go. Starts a new one if there is none, or none that is whole from its first record on.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn resume(run: &Path, step: u64) -> Result<Self> {
        let path = FILE.iter().fold(run.to_owned(), |path, part| path.join(part));
        if !path.exists() {
            return Self::create(run);
        }
        let fail = |e| Error::io(&path, e);
        let bytes = std::fs::read(&path).map_err(fail)?;
        let whole = records(&bytes).take_while(|record| step_of(record) <= step);
        let kept: usize = whole.map(|record| HEAD + record.len() + TAIL).sum();
        if kept == 0 {
            return Self::create(run);
        }
        let file = OpenOptions::new().append(true).open(&path).map_err(fail)?;
        file.set_len(kept as u64).map_err(fail)?;
        Ok(Self { path, file })
    }

    /// Appends the metrics of a step under their names.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let step = metrics.get(name::GLOBAL_STEP).unwrap_or(0.0) as u64;
        self.append(&summary_event(now(), step, metrics))
    }

    fn append(&mut self, event: &[u8]) -> Result<()> {
        let written = self.file.write_all(&frame(event)).and_then(|()| self.file.flush());
        written.map_err(|e| Error::io(&self.path, e))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// How a field's value is written.
const VARINT: u8 = 0;
const EIGHT_BYTES: u8 = 1;
const BYTES: u8 = 2;
const FOUR_BYTES: u8 = 5;

/// A protocol buffer that grows field by field. Field numbers are below 16, so a key is one byte.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u8, kind: u8) {
        self.0.push(field << 3 | kind);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn double(mut self, field: u8, value: f64) -> Self {
        self.key(field, EIGHT_BYTES);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(mut self, field: u8, value: f32) -> Self {
        self.key(field, FOUR_BYTES);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn integer(mut self, field: u8, value: u64) -> Self {
        self.key(field, VARINT);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        self.key(field, BYTES);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }
}

fn version_event(time: f64) -> Vec<u8> {
    Message::default().double(1, time).bytes(3, VERSION.as_bytes()).0
}

fn summary_event(time: f64, step: u64, metrics: &Metrics) -> Vec<u8> {
    let value = |tag: &str, value: f64| {
        Message::default().bytes(1, tag.as_bytes()).float(2, value as f32).0
    };
    let summary = metrics
        .iter()
        .filter(|(tag, x)| *tag != name::GLOBAL_STEP && (*x as f32).is_finite())
        .fold(Message::default(), |summary, (tag, x)| summary.bytes(1, &value(tag, x)));
    Message::default().double(1, time).integer(2, step).bytes(5, &summary.0).0
}

/// An event as a record of the file.
fn frame(event: &[u8]) -> Vec<u8> {
    let mut out = (event.len() as u64).to_le_bytes().to_vec();
    out.extend(masked_crc(&out).to_le_bytes());
    out.extend(event);
    out.extend(masked_crc(event).to_le_bytes());
    out
}

/// The contents of the records of a file, up to the first that is damaged or cut short.
fn records(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (head, rest) = bytes.split_at_checked(HEAD)?;
        let (length, crc) = head.split_at(8);
        if u32::from_le_bytes(crc.try_into().ok()?) != masked_crc(length) {
            return None;
        }
        let length = u64::from_le_bytes(length.try_into().ok()?);
        let (event, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
        let (crc, rest) = rest.split_at_checked(TAIL)?;
        if u32::from_le_bytes(crc.try_into().ok()?) != masked_crc(event) {
            return None;
        }
        bytes = rest;
        Some(event)
    })
}

/// The step of an event written here: its second field, after the nine bytes of the first.
fn step_of(event: &[u8]) -> u64 {
    let Some((&key, rest)) = event.get(9..).and_then(<[u8]>::split_first) else { return 0 };
    if key != 2 << 3 | VARINT {
        return 0;
    }
    let end = rest.iter().position(|byte| byte & 0x80 == 0).map_or(rest.len(), |last| last + 1);
    rest[..end.min(10)].iter().rev().fold(0, |step, byte| step << 7 | u64::from(byte & 0x7f))
}

/// CRC-32C, rotated and offset as TFRecord wants it, so that a checksum of checksums differs.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bits reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

/// The remainders of all bytes.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    /// Key and content of each field; numbers as their little-endian bytes.
    fn fields(mut message: &[u8]) -> Vec<(u8, Vec<u8>)> {
        fn varint(message: &mut &[u8]) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = message[0];
                *message = &message[1..];
                value |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    return value;
                }
            }
        }
        let mut out = Vec::new();
        while let Some((&key, rest)) = message.split_first() {
            message = rest;
            let length = match key & 7 {
                VARINT => {
                    let value = varint(&mut message);
                    out.push((key >> 3, value.to_le_bytes().to_vec()));
                    continue;
                }
                EIGHT_BYTES => 8,
                FOUR_BYTES => 4,
                _ => varint(&mut message) as usize,
            };
            let (content, rest) = message.split_at(length);
            out.push((key >> 3, content.to_vec()));
            message = rest;
        }
        out
    }

    fn step(step: u32, values: &[(&str, f64)]) -> Metrics {
        let mut metrics = Metrics::new();
        metrics.set(name::GLOBAL_STEP, f64::from(step));
        values.iter().for_each(|(name, value)| metrics.set(name, *value));
        metrics
    }

    /// Step, and tag and value of each scalar.
    fn decode(event: &[u8]) -> (u64, Vec<(String, f32)>) {
        let fields_of = fields(event);
        let step = fields_of.iter().find(|(n, _)| *n == 2).unwrap();
        let summary = fields_of.iter().find(|(n, _)| *n == 5).unwrap();
        let value = |(_, bytes): &(u8, Vec<u8>)| {
            let value = fields(bytes);
            let tag = String::from_utf8(value[0].1.clone()).unwrap();
            (tag, f32::from_le_bytes(value[1].1[..].try_into().unwrap()))
        };
        let scalars = fields(&summary.1).iter().map(value).collect();
        (u64::from_le_bytes(step.1[..].try_into().unwrap()), scalars)
    }

    #[test]
    fn checksums_are_the_published_ones() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(
            masked_crc(&[0; 32]),
            0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
    }

    #[test]
    fn events_are_read_back() {
        let dir = TestDir::new("tensorboard");
        let mut writer = EventWriter::create(dir.path()).unwrap();
        let values = [("actor/entropy", 0.25), ("x/nan", f64::NAN), ("x/huge", 1e300)];
        writer.write(&step(300, &values)).unwrap();
        let bytes = std::fs::read(writer.path).unwrap();
        let events: Vec<&[u8]> = records(&bytes).collect();
        assert_eq!(events.len(), 2);
        let version = fields(events[0]);
        assert_eq!(version[1], (3, b"brain.Event:2".to_vec()));
        let time = f64::from_le_bytes(version[0].1[..].try_into().unwrap());
        assert!(time > 1.7e9, "{time}");
        assert_eq!(decode(events[1]), (300, vec![("actor/entropy".to_owned(), 0.25)]));
        assert_eq!(step_of(events[1]), 300);
    }

    #[test]
    fn a_resumed_file_holds_no_later_step_and_nothing_damaged() {
        let dir = TestDir::new("tensorboard-resume");
        let mut writer = EventWriter::create(dir.path()).unwrap();
        (0..=3).for_each(|n| writer.write(&step(n, &[("a", f64::from(n))])).unwrap());
        let mut bytes = std::fs::read(&writer.path).unwrap();
        let whole = bytes.len();
        bytes.extend([7; 30]);
        std::fs::write(&writer.path, &bytes).unwrap();
        let steps = |path: &Path| -> Vec<(u64, f32)> {
            let bytes = std::fs::read(path).unwrap();
            let decoded = records(&bytes).skip(1).map(decode);
            decoded.map(|(step, scalars)| (step, scalars[0].1)).collect()
        };
        let mut writer = EventWriter::resume(dir.path(), 3).unwrap();
        assert_eq!(std::fs::metadata(&writer.path).unwrap().len(), whole as u64);
        writer.write(&step(4, &[("a", 4.0)])).unwrap();
        assert_eq!(steps(&writer.path), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]);
        let mut writer = EventWriter::resume(dir.path(), 1).unwrap();
        writer.write(&step(2, &[("a", 9.0)])).unwrap();
        assert_eq!(steps(&writer.path), [(0, 0.0), (1, 1.0), (2, 9.0)]);
        std::fs::write(&writer.path, b"no record").unwrap();
        let writer = EventWriter::resume(dir.path(), 1).unwrap();
        assert_eq!(steps(&writer.path), []);
    }
}
