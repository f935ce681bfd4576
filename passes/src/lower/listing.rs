//! The listing of launches for people (`--emit kernels`): each with its kernel, and the operations that the kernel
//! computes, with their sites and their places in the `.peft` files.

use std::fmt::Write;

use peft_grammar::graph::Location;

use super::computed::Computed;
use super::module::Lowered;

impl Lowered {
    /// The launches of every entry in order, each with its kernel and the operations that it computes: the variable
    /// that the operation's result is assigned to, its site, the fusion rule that introduced it, and its place in the
    /// `.peft` file. With a `site`, only launches that compute one of its operations.
    pub fn listing(&self, site: Option<&str>) -> String {
        let mut out = String::new();
        for (entry, launches) in &self.listing {
            let of_entry = self.manifest.entries.get(entry).map_or(&self.manifest.prepare, |entry| &entry.launches);
            let mut lines = String::new();
            for (at, (launch, dispatches)) in of_entry.iter().zip(launches).enumerate() {
                let operations: Vec<&Computed> = dispatches.iter().flat_map(|operations| operations.iter()).collect();
                if let Some(site) = site
                    && !operations.iter().any(|operation| operation.location.within(site))
                {
                    continue;
                }
                let _ = writeln!(lines, "{at:>5}  {}", self.manifest.kernels[launch.kernel]);
                for Computed { op, location: Location { file, line, site, name, rule, .. } } in operations {
                    let variable = if name.is_empty() { String::new() } else { format!("{name} = ") };
                    let place = if *line > 0 { format!("{file}:{line}") } else { String::new() };
                    let rule = if rule.is_empty() { String::new() } else { format!("[{rule}]") };
                    let text = format!("       {:<36} {site:<22} {place:<34} {rule}", format!("{variable}{op}"));
                    let _ = writeln!(lines, "{}", text.trim_end());
                }
            }
            if !lines.is_empty() {
                let _ = write!(out, "{entry}, {} launches\n{lines}", of_entry.len());
            }
        }
        out
    }
}
