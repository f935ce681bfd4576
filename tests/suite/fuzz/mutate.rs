//! Mutations of bytes, JSON values, safetensors headers, GGUF fields and rows of text.

use serde_json::{Map, Number, Value};

/// SplitMix64 (Steele et al., 2014). One seed gives one sequence of choices.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..n`, or 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.word() % n as u64) as usize }
    }

    pub fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// A few edits that ignore the structure of the content.
pub fn bytes(random: &mut Random, data: &mut Vec<u8>) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len());
        match random.below(7) {
            0 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            1 if !data.is_empty() => data[at] = random.word() as u8,
            2 => data.truncate(at),
            3 => drop(data.drain(at..(at + random.below(64)).min(data.len()))),
            4 => {
                let end = (at + random.below(256)).min(data.len());
                let copy = data[at..end].to_vec();
                let to = random.below(data.len() + 1);
                data.splice(to..to, copy);
            }
            5 => {
                let token: &&[u8] = random.of(TOKENS);
                data.splice(at..at, token.iter().copied());
            }
            _ => {
                let count = random.below(2000);
                let byte = *random.of(b"[{(\"\\ \0\n\t9");
                data.splice(at..at, std::iter::repeat_n(byte, count));
            }
        }
    }
}

const TOKENS: &[&[u8]] = &[
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xf0\x9f",
    b"NaN",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"null",
    b"\"\\ud800\"",
    b"\"a\":1,\"a\":2,",
    b"\r\n",
    b"\t\t",
    b"{}",
    b"[]",
    b",",
];

/// The largest mutated JSON text, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// A few edits of a JSON value's structure. Content that is not JSON is edited as bytes.
pub fn json(random: &mut Random, data: &mut Vec<u8>) {
    let Ok(mut value) = serde_json::from_slice::<Value>(data) else { return bytes(random, data) };
    for _ in 0..1 + random.below(3) {
        edit(random, &mut value);
    }
    // Repeated copies may exceed the limit.
    let mut text = vec![0; MAX_BYTES];
    let mut left = &mut text[..];
    if serde_json::to_writer(&mut left, &value).is_err() {
        return bytes(random, data);
    }
    let written = MAX_BYTES - left.len();
    text.truncate(written);
    *data = text;
    if random.below(8) == 0 {
        bytes(random, data);
    }
}

/// Changes a random part of a value.
fn edit(random: &mut Random, value: &mut Value) {
    let deeper = random.below(5) > 0;
    match value {
        Value::Object(map) if deeper && !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).expect("within").clone();
            match random.below(8) {
                0 => drop(map.remove(&key)),
                1 => {
                    let other = map.keys().nth(random.below(map.len())).expect("within").clone();
                    let taken = map[&other].clone();
                    map.insert(key, taken);
                }
                2 => {
                    let taken = map.remove(&key).expect("it is there");
                    map.insert(strange_text(random), taken);
                }
                _ => edit(random, map.get_mut(&key).expect("it is there")),
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => {
            let at = random.below(items.len());
            match random.below(8) {
                0 => drop(items.remove(at)),
                1 => {
                    let copy = items[at].clone();
                    items.extend(std::iter::repeat_n(copy, 1 + random.below(300)));
                }
                2 => {
                    let other = random.below(items.len());
                    items.swap(at, other);
                }
                _ => edit(random, &mut items[at]),
            }
        }
        _ => *value = strange(random, value),
    }
}

/// Another value: a close one, one of another type, or an extreme one.
fn strange(random: &mut Random, was: &Value) -> Value {
    match random.below(12) {
        0 => Value::Null,
        1 => Value::Bool(random.below(2) == 0),
        2 => (*random.of(&[0i64, 1, -1, 2, 7, 64, 1 << 31, -(1 << 31), i64::MAX, i64::MIN])).into(),
        3 => (*random.of(&[u64::MAX, 1 << 32, 1 << 53, 1 << 62])).into(),
        4 => Number::from_f64(*random.of(&[0.0, -0.0, 0.5, 1e-300, 1e300, -1.5, f64::MIN_POSITIVE]))
            .map_or(Value::Null, Value::Number),
        5 => Value::String(strange_text(random)),
        6 => Value::Array(vec![]),
        7 => Value::Object(Map::new()),
        8 => Value::Array(vec![was.clone(); 1 + random.below(3)]),
        9 => Value::Object(Map::from_iter([(strange_text(random), was.clone())])),
        10 => (0..random.below(200)).fold(was.clone(), |inner, _| Value::Array(vec![inner])),
        _ => match was.as_i64() {
            Some(n) => n.wrapping_add(random.below(5) as i64 - 2).into(),
            None => Value::String(was.to_string()),
        },
    }
}

fn strange_text(random: &mut Random) -> String {
    match random.below(8) {
        0 => String::new(),
        1 => "a".repeat(random.below(5000)),
        2 => "\u{1F600}\u{0301}\u{200B}\u{FEFF}".into(),
        3 => "\0".into(),
        4 => "../../etc/passwd".into(),
        5 => "(a+)+$[".into(),
        6 => "{{{{%".into(),
        _ => format!("key{}", random.below(100)),
    }
}

/// Mutates a safetensors file, whose first eight bytes are the length of the following JSON header.
pub fn safetensors(random: &mut Random, data: &mut Vec<u8>) {
    let length = data.first_chunk().map_or(0, |c| u64::from_le_bytes(*c) as usize);
    if random.below(4) == 0 || data.len() < 8 + length {
        return bytes(random, data);
    }
    let body = data.split_off(8 + length);
    let mut header = data.split_off(8);
    if random.below(3) == 0 {
        bytes(random, &mut header)
    } else {
        json(random, &mut header)
    }
    // The stored header length may be wrong too.
    let off = if random.below(8) == 0 { random.word() >> random.below(64) } else { 0 };
    data.clear();
    data.extend((header.len() as u64).wrapping_add(off).to_le_bytes());
    data.extend(header);
    data.extend(body);
}

/// Mutates counts, lengths, types, dimensions and offsets in the header of a GGUF file.
pub fn gguf(random: &mut Random, data: &mut Vec<u8>) {
    let fields = fields(data);
    if random.below(4) == 0 || fields.is_empty() {
        return bytes(random, data);
    }
    for _ in 0..1 + random.below(3) {
        // Most fields belong to the list of tokens, so the first fields are preferred.
        let near = random.below(4) > 0;
        let (at, width) = match near {
            true => fields[random.below(fields.len().min(64))],
            false => *random.of(&fields),
        };
        let field = &mut data[at..at + width];
        let mut old = [0; 8];
        old[..width].copy_from_slice(field);
        let old = u64::from_le_bytes(old);
        let strange = [0, 1, 2, 3, 7, 31, 32, 255, 1 << 31, 1 << 32, 1 << 60, 1 << 63, u64::MAX, u64::MAX - 31];
        let new = match random.below(3) {
            0 => old.wrapping_add(random.below(9) as u64).wrapping_sub(4),
            1 => random.word() >> random.below(64),
            _ => *random.of(&strange),
        };
        field.copy_from_slice(&new.to_le_bytes()[..width]);
    }
}

/// Offsets and widths in bytes of the numbers in a valid GGUF header. Those of the file and of tensors come first.
fn fields(data: &[u8]) -> Vec<(usize, usize)> {
    fn number(data: &[u8], at: &mut usize, width: usize, all: &mut Vec<(usize, usize)>) -> Option<u64> {
        let mut value = [0; 8];
        value[..width].copy_from_slice(data.get(*at..*at + width)?);
        all.push((*at, width));
        *at += width;
        Some(u64::from_le_bytes(value))
    }
    fn value(data: &[u8], at: &mut usize, kind: u64, all: &mut Vec<(usize, usize)>) -> Option<()> {
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 => {
                let length = number(data, at, 8, all)?;
                *at = at.checked_add(usize::try_from(length).ok()?).filter(|&end| end <= data.len())?;
                return Some(());
            }
            9 => {
                let kind = number(data, at, 4, all)?;
                let count = number(data, at, 8, all)?;
                return (0..count).try_for_each(|_| value(data, at, kind, all));
            }
            _ => 8,
        };
        number(data, at, width, all).map(drop)
    }
    let (mut at, mut head, mut keys, mut infos) = (4, vec![], vec![], vec![]);
    let mut walk = || -> Option<()> {
        number(data, &mut at, 4, &mut head)?;
        let tensors = number(data, &mut at, 8, &mut head)?;
        for _ in 0..number(data, &mut at, 8, &mut head)? {
            value(data, &mut at, 8, &mut keys)?;
            let kind = number(data, &mut at, 4, &mut keys)?;
            value(data, &mut at, kind, &mut keys)?;
        }
        for _ in 0..tensors {
            value(data, &mut at, 8, &mut infos)?;
            let axes = number(data, &mut at, 4, &mut infos)?;
            (0..axes).try_for_each(|_| number(data, &mut at, 8, &mut infos).map(drop))?;
            number(data, &mut at, 4, &mut infos)?;
            number(data, &mut at, 8, &mut infos)?;
        }
        Some(())
    };
    let _ = walk();
    [head, infos, keys].concat()
}

/// Mutates rows of text: inserts and removes fields and line endings.
pub fn rows(random: &mut Random, data: &mut Vec<u8>) {
    let mut lines: Vec<Vec<u8>> = data.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    for _ in 0..1 + random.below(4) {
        let at = random.below(lines.len());
        match random.below(7) {
            0 => lines.insert(at, vec![]),
            1 => lines[at].clear(),
            2 => lines[at].retain(|&b| b != b'\t'),
            3 => lines[at].extend(b"\t7"),
            4 => lines[at] = b"film \xc2\xa0".repeat(1 + random.below(3000)),
            5 => lines.truncate(at),
            _ => bytes(random, &mut lines[at]),
        }
        if lines.is_empty() {
            lines.push(vec![]);
        }
    }
    *data = lines.join(&b'\n');
}
