//! The options of commands that read data sets.

use std::path::PathBuf;

use peft_grammar::model::Model;

use crate::cache;
use crate::data::{DataError, Dataset, Reading, Tokenizer};
use crate::failure::Failure;

/// The options of commands that read data sets.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct DataArgs {
    /// Skip rows that cannot be used, and print their number and what is wrong with the first
    #[arg(long)]
    skip_bad: bool,
}

impl DataArgs {
    /// Reads the data set and prints its description on standard error.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or a row cannot be used and `--skip-bad` is not given.
    pub fn read(self, files: &[PathBuf], model: &Model, tokenizer: &Tokenizer) -> Result<Dataset, Failure> {
        let reading = Reading { skip_bad: self.skip_bad, cache: cache::folder()? };
        let data = Dataset::read(files, &model.task, tokenizer, &reading).map_err(|error| match error {
            DataError::Place { path, at, message, skippable: true } if !self.skip_bad => {
                let message = message + "\n`--skip-bad` skips such rows and counts them";
                DataError::Place { path, at, message, skippable: true }
            }
            other => other,
        })?;
        super::say(&data.describe());
        Ok(data)
    }
}
