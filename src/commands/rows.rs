//! How the commands that take data read it.

use std::path::PathBuf;

use peft_grammar::model::Model;

use crate::cache;
use crate::data::{DataError, Dataset, Reading, Tokenizer};
use crate::failure::Failure;

/// What to do about rows that cannot be used.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Rows {
    /// Leave out rows that cannot be used, and say how many there are and what is wrong with the first
    #[arg(long)]
    skip_bad: bool,
}

impl Rows {
    /// Reads files and says what they hold.
    pub fn read(self, files: &[PathBuf], model: &Model, tokenizer: &Tokenizer) -> Result<Dataset, Failure> {
        let reading = Reading { skip_bad: self.skip_bad, cache: cache::folder()? };
        let data = Dataset::read(files, &model.task, tokenizer, &reading).map_err(|error| match error {
            DataError::Place { path, at, message, skippable: true } if !self.skip_bad => {
                let message = message + "\n`--skip-bad` leaves out such rows and counts them";
                DataError::Place { path, at, message, skippable: true }
            }
            other => other,
        })?;
        super::say(&data.describe());
        Ok(data)
    }
}
