//! Writes TensorBoard event files: protobuf messages, each framed by its length and two checksums.

/// Encodes records with one wall time, in seconds since 1970.
pub struct Events {
    time: f64,
}

/// Fields of `tensorflow.Event`, `Summary`, `Summary.Value` and `SessionLog`.
mod field {
    pub const WALL_TIME: u32 = 1;
    pub const STEP: u32 = 2;
    pub const FILE_VERSION: u32 = 3;
    pub const SUMMARY: u32 = 5;
    pub const SESSION_LOG: u32 = 7;
    pub const VALUE: u32 = 1;
    pub const TAG: u32 = 1;
    pub const SIMPLE_VALUE: u32 = 2;
    pub const STATUS: u32 = 1;
}

/// `SessionLog.START`: readers drop the records of this step and later ones in earlier files.
const START: u64 = 1;

impl Events {
    pub fn at(time: f64) -> Self {
        Events { time }
    }

    /// The records at the beginning of a file. `resumed` is the last step whose earlier records stay valid.
    pub fn start(&self, resumed: Option<u64>) -> Vec<u8> {
        let mut bytes = record(self.event(0).bytes(field::FILE_VERSION, b"brain.Event:2").done());
        if let Some(step) = resumed {
            let log = Message::default().varint(field::STATUS, START).done();
            bytes.extend(record(self.event(step + 1).bytes(field::SESSION_LOG, &log).done()));
        }
        bytes
    }

    /// A record with the scalars of one step.
    pub fn scalars(&self, step: u64, figures: &[(&str, f64)]) -> Vec<u8> {
        let summary = figures.iter().fold(Message::default(), |summary, (tag, value)| {
            let value = Message::default().bytes(field::TAG, tag.as_bytes()).float(field::SIMPLE_VALUE, *value as f32);
            summary.bytes(field::VALUE, &value.done())
        });
        record(self.event(step).bytes(field::SUMMARY, &summary.done()).done())
    }

    fn event(&self, step: u64) -> Message {
        Message::default().double(field::WALL_TIME, self.time).varint(field::STEP, step)
    }
}

/// A framed record: length, checksum of the length, data, checksum of the data. All numbers are little-endian.
fn record(data: Vec<u8>) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut bytes = length.to_vec();
    bytes.extend(masked(crc32c(&length)).to_le_bytes());
    bytes.extend(&data);
    bytes.extend(masked(crc32c(&data)).to_le_bytes());
    bytes
}

/// The TFRecord format stores masked checksums, because the checksum of data that contain their own checksum is weak.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), reflected. It works bit by bit, which is fast enough for a few records per second.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()))
    })
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

/// Protobuf wire types.
const VARINT: u32 = 0;
const I64: u32 = 1;
const LEN: u32 = 2;
const I32: u32 = 5;

impl Message {
    fn raw(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn tag(&mut self, field: u32, wire: u32) {
        self.raw(u64::from(field << 3 | wire));
    }

    fn varint(mut self, field: u32, value: u64) -> Self {
        self.tag(field, VARINT);
        self.raw(value);
        self
    }

    fn bytes(mut self, field: u32, value: &[u8]) -> Self {
        self.tag(field, LEN);
        self.raw(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn double(mut self, field: u32, value: f64) -> Self {
        self.tag(field, I64);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn float(mut self, field: u32, value: f32) -> Self {
        self.tag(field, I32);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn done(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the algorithm, and the test vectors of RFC 3720, B.4.
    #[test]
    fn crc32c_matches_published_vectors() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
    }

    #[test]
    fn an_event_has_the_documented_bytes() {
        let bytes = Events::at(1.5).scalars(300, &[("loss", 0.25)]);
        let data = [
            &[0x09][..],
            &1.5f64.to_le_bytes(), // wall_time
            &[0x10, 0xAC, 0x02],   // step 300
            &[0x2A, 13, 0x0A, 11], // summary { value {
            &[0x0A, 4],
            b"loss",
            &[0x15],
            &0.25f32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(bytes[..8], (data.len() as u64).to_le_bytes());
        assert_eq!(bytes[12..12 + data.len()], data);
        assert_eq!(bytes.len(), data.len() + 16);
    }
}
