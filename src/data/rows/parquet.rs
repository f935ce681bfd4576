//! Parses Parquet, the storage format of data sets on the Hugging Face hub. Row groups are read in order.

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};

use super::{Fault, Location, Row, Value};
use crate::contained::contained;

/// The first and the last bytes of a Parquet file.
pub const MAGIC: &[u8] = b"PAR1";

/// The rows of a file. Iteration ends at the first damaged row.
pub fn rows<'f>(bytes: &Bytes) -> Result<impl Iterator<Item = Result<Row<'f>, Fault>> + use<'f>, Fault> {
    let open = || {
        let reader = SerializedFileReader::new(bytes.clone())?;
        let count = reader.metadata().file_metadata().num_rows();
        Ok((RowIter::from_file_into(Box::new(reader)), count))
    };
    let (mut records, count) = caught(open).map_err(|message| Fault::fatal(Location::Row(1), message))?;
    let (mut number, mut over) = (0, false);
    Ok(std::iter::from_fn(move || {
        if over {
            return None;
        }
        number += 1;
        // The conversion is inside `caught` because the library panics when it formats a date out of range.
        let next = || Ok(records.next().transpose()?.map(|record| row(record, Location::Row(number))));
        let row = match caught(next) {
            Ok(Some(row)) => row,
            Ok(None) if (number as i64) <= count => {
                let message = format!("the file ends here, and says that it has {count} rows; fetch or write it again");
                Err(Fault::fatal(Location::Row(number), message))
            }
            Ok(None) => return None,
            Err(message) => Err(Fault::fatal(Location::Row(number), message)),
        };
        over = matches!(&row, Err(fault) if fault.fatal);
        Some(row)
    }))
}

/// Runs the library. Its errors and its panics become messages.
fn caught<T>(work: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    let said = |why: String| format!("the Parquet file is damaged, cut short or of a kind that is not read ({why})");
    match contained("parquet", work) {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(said(error.to_string())),
        Err(why) => Err(said(why)),
    }
}

fn row<'f>(record: Record, at: Location) -> Result<Row<'f>, Fault> {
    let fields = record.into_columns().into_iter().map(|(name, field)| Ok((name, value(field)?)));
    match fields.collect::<Result<Vec<_>, String>>() {
        Ok(fields) => Ok(Row::of(at, fields)),
        Err(message) => Err(Fault::row(at, message)),
    }
}

fn value(field: Field) -> Result<Value, String> {
    let number = |x: f64| serde_json::Number::from_f64(x).map_or(Value::Null, |n| Value::Number(n.to_string()));
    let object = |fields: Vec<(String, Field)>| {
        let fields = fields.into_iter().map(|(name, field)| Ok((name, value(field)?)));
        fields.collect::<Result<_, String>>().map(Value::Object)
    };
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(value),
        Field::Byte(_) | Field::Short(_) | Field::Int(_) | Field::Long(_) => Value::Number(field.to_string()),
        Field::UByte(_) | Field::UShort(_) | Field::UInt(_) | Field::ULong(_) => Value::Number(field.to_string()),
        Field::Float16(x) => number(x.to_f64()),
        // A float is written in the shortest form of its own precision.
        Field::Float(x) => number(x.to_string().parse().unwrap_or(f64::NAN)),
        Field::Double(x) => number(x),
        Field::Str(text) => Value::Text(text),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => return Err("a column holds bytes that are no text".into()),
        },
        Field::Group(record) => object(record.into_columns())?,
        Field::ListInternal(list) => {
            Value::List(list.elements().iter().cloned().map(value).collect::<Result<_, String>>()?)
        }
        Field::MapInternal(map) => {
            let name = |key: &Field| match key {
                Field::Str(text) => text.clone(),
                other => other.to_string(),
            };
            object(map.entries().iter().map(|(key, field)| (name(key), field.clone())).collect())?
        }
        dates_and_decimals => Value::Text(dates_and_decimals.to_string()),
    })
}
