//! Expands rows into several examples: one for each item of a list, such as the turns of a conversation.

use peft_grammar::model::{EARLIER_ITEMS, Extent, Piece, item_name};

use super::error::did_you_mean;
use super::rows::{Fault, FileRows, Location, Row, Value};

/// The expansion that a task's `each` specifies.
pub struct Items {
    /// The names of the lists, which are iterated in parallel.
    lists: Vec<String>,
    /// The names of all fields and lists that the template reads.
    names: Vec<String>,
    /// The largest number of earlier items that the template reads for an item.
    before: usize,
}

impl Items {
    pub fn new(lists: &[String], template: &[Piece]) -> Option<Self> {
        let mut items = Items { lists: lists.to_vec(), names: vec![], before: 0 };
        items.reads(template);
        (!lists.is_empty()).then_some(items)
    }

    fn reads(&mut self, template: &[Piece]) {
        for piece in template {
            match piece {
                Piece::Special(_) | Piece::Literal(_) | Piece::As(..) => {}
                Piece::Field(name) => self.names.push(name.clone()),
                Piece::Repeat(_) => self.before = usize::MAX,
                Piece::Each(name, _) => self.list(name, usize::MAX),
                Piece::Cut(extent, piece) => match (&**piece, extent) {
                    (Piece::Each(name, _), Extent::Last(count)) => {
                        self.list(name, usize::try_from(*count).unwrap_or(usize::MAX));
                    }
                    (Piece::Each(name, _), Extent::First(_)) => self.list(name, usize::MAX),
                    (piece, _) => self.reads(std::slice::from_ref(piece)),
                },
            }
        }
    }

    fn list(&mut self, name: &str, items: usize) {
        self.names.push(name.to_owned());
        if name == EARLIER_ITEMS {
            self.before = self.before.max(items);
        }
    }

    /// Whether the template reads this column or a part of it.
    fn is_read(&self, column: &str) -> bool {
        let leads = |rest: &str| rest.is_empty() || rest.starts_with('.');
        self.names.iter().any(|name| name.strip_prefix(column).is_some_and(leads))
    }

    /// Expands each row into one row per item, in order. An expanded row holds the row's other columns, the item of
    /// each list under the list's name, and the earlier items as a list. Columns that the template does not read are
    /// dropped.
    pub fn rows<'f>(self, mut rows: FileRows<'f>) -> FileRows<'f> {
        let (header, implied, left_out) = (rows.header.take(), rows.implied, rows.left_out);
        let items = std::rc::Rc::new(self);
        let each = rows.flat_map(move |row| -> Box<dyn Iterator<Item = Result<Row<'f>, Fault>> + 'f> {
            let found = row.and_then(|row| match items.of(&row) {
                Ok((fields, steps)) => Ok((row.at.clone(), fields, steps)),
                Err(message) => Err(Fault::row(row.at.clone(), message)),
            });
            let (at, fields, steps) = match found {
                Ok(found) => found,
                Err(fault) => return Box::new(std::iter::once(Err(fault))),
            };
            let before = items.before;
            Box::new((0..steps.len()).map(move |i| {
                let mut all = fields.clone();
                all.extend(steps[i].clone());
                let earlier = i - before.min(i)..i;
                all.push((
                    EARLIER_ITEMS.into(),
                    Value::List(steps[earlier].iter().cloned().map(Value::Object).collect()),
                ));
                Ok(Row::of(Location::Part { of: Box::new(at.clone()), first: i + 1, last: i + 1 }, all))
            }))
        });
        let mut rows = FileRows::new(each);
        (rows.header, rows.implied, rows.left_out) = (header, implied, left_out);
        rows
    }

    /// The other columns of a row, and for each step the items of its lists.
    #[allow(clippy::type_complexity)]
    fn of(&self, row: &Row) -> Result<(Vec<(String, Value)>, Vec<Vec<(String, Value)>>), String> {
        let Some(fields) = row.fields() else { return Err(NO_LISTS.into()) };
        let mut lists: Vec<(&str, &[Value])> = vec![];
        for name in &self.lists {
            match super::rows::find(fields, name) {
                Some(Value::List(items)) => lists.push((name, items)),
                Some(other) => return Err(format!("`{name}` is {}, but `each` needs a list", other.kind())),
                None => {
                    let names = row.names();
                    let hint = did_you_mean(name, names.iter().copied());
                    return Err(format!("no list `{name}`{hint}; the row has `{}`", names.join("`, `")));
                }
            }
        }
        let (first, items) = lists[0];
        if let Some((other, others)) = lists.iter().find(|(_, other)| other.len() != items.len()) {
            let (many, as_many) = (items.len(), others.len());
            return Err(format!("`{first}` and `{other}` are iterated together, but have {many} and {as_many} items"));
        }
        if items.is_empty() {
            return Err(format!("`{first}` is empty: there is no item to make an example of"));
        }
        let is_list = |name: &String| self.lists.contains(name);
        let rest: Vec<_> = fields.iter().filter(|(name, _)| !is_list(name) && self.is_read(name)).cloned().collect();
        let taken = |name: &String| name == EARLIER_ITEMS || self.lists.iter().any(|list| item_name(list) == name);
        if let Some((name, _)) = rest.iter().find(|(name, _)| taken(name)) {
            return Err(format!("the column name `{name}` is reserved for `each`; rename the column"));
        }
        let step =
            |i: usize| lists.iter().map(|(name, items)| (item_name(name).to_owned(), items[i].clone())).collect();
        Ok((rest, (0..items.len()).map(step).collect()))
    }
}

/// The error for a table of texts whose task iterates over lists.
pub const NO_LISTS: &str = "a table of texts holds no lists for the task's `each`; write the rows as json";
