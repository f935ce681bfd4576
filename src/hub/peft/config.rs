//! Reads and writes `adapter_config.json`: the keys of every adapter, and the keys that a method's counterpart
//! declares.

use std::collections::BTreeMap;

use fancy_regex::Regex;
use peft_grammar::counterpart::{Condition, Consequence, Constant, Counterpart, Part, Rule};
use peft_grammar::library;
use peft_grammar::model::{AppliedMethod, ConfigValue};
use serde_json::{Map, Value};

use super::CONFIG;
use super::modules::{Application, Module, number};

/// Keys of every adapter. Those that describe its origin are not read. `fan_in_fan_out` is not read either, since PEFT
/// itself corrects it for each module.
const COMMON_KEYS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
];

/// An adapter's settings.
pub struct Config<'a> {
    /// The keys and values of the file.
    pub map: &'a Map<String, Value>,
}

/// Whether a value counts as absent: `null`, or an empty object or list.
pub fn unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// Whether a key's value equals the declared one.
fn same(found: &Value, wanted: &ConfigValue) -> bool {
    match wanted {
        ConfigValue::Bool(b) => found.as_bool() == Some(*b),
        ConfigValue::Int(n) => found.as_f64() == Some(*n as f64),
        ConfigValue::Float(x) => found.as_f64() == Some(*x),
        // PEFT ignores the case of some words.
        ConfigValue::Str(s) => found.as_str().is_some_and(|found| found.eq_ignore_ascii_case(s)),
    }
}

fn text(value: &ConfigValue) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

impl<'a> Config<'a> {
    /// The key's value, if it is set.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !unset(v))
    }

    /// The value of a flag, false if absent.
    ///
    /// # Errors
    ///
    /// The value is neither `true` nor `false`.
    pub fn flag(&self, key: &str) -> Result<bool, String> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(other) => Err(format!("`{key}` of {CONFIG} is {other}, but should be `true` or `false`")),
        }
    }

    /// The strings of a list, or the single string; empty if absent.
    ///
    /// # Errors
    ///
    /// The value is anything else.
    pub fn strings(&self, key: &str) -> Result<Vec<&'a str>, String> {
        match self.get(key) {
            None => Ok(vec![]),
            Some(Value::String(one)) => Ok(vec![one]),
            Some(Value::Array(all)) => {
                let all: Option<Vec<&str>> = all.iter().map(Value::as_str).collect();
                all.ok_or_else(|| format!("`{key}` of {CONFIG} is not a list of strings"))
            }
            Some(other) => Err(format!("`{key}` of {CONFIG} is {other}, but should be a list of strings")),
        }
    }

    /// Checks that every key that is set is known: a common key, or one that a counterpart declares.
    ///
    /// # Errors
    ///
    /// A key is unknown, so its effect is.
    pub fn check_keys(&self, counterparts: &[&Counterpart]) -> Result<(), String> {
        let declared = |key: &str| {
            counterparts.iter().any(|c| {
                let patterns = |k: &Rule| matches!(k, Rule::Is { patterns: Some(p), .. } if p == key);
                c.keys.iter().any(|k| k.name == key || patterns(&k.rule)) || c.modules.iter().any(|m| m == key)
            })
        };
        let unknown =
            |(key, value): &(&String, &Value)| !unset(value) && !COMMON_KEYS.contains(&&***key) && !declared(key);
        match self.map.iter().find(unknown) {
            None => Ok(()),
            Some((key, value))
                if let Some((method, kind)) =
                    counterparts.iter().find_map(|c| library::method_listing(&c.peft_type, key)) =>
            {
                Err(format!(
                    "`{key}` of {CONFIG} is {value}: these are modules to which `{method}` is applied at every {kind} \
                     site, and the spec applies it to none"
                ))
            }
            Some((key, value)) => {
                let known = counterparts
                    .iter()
                    .flat_map(|c| &c.keys)
                    .map(|k| k.name.as_str())
                    .chain(COMMON_KEYS.iter().copied());
                let near = known
                    .map(|k| (strsim::normalized_levenshtein(k, key), k))
                    .filter(|(score, _)| *score > 0.7)
                    .max_by(|a, b| a.0.total_cmp(&b.0));
                let near = near.map(|(_, k)| format!(" (is `{k}` meant?)")).unwrap_or_default();
                Err(format!(
                    "`{key}` of {CONFIG} is {value}, and this key is not known{near}; if the adapter computes the same \
                     without it, remove the key"
                ))
            }
        }
    }

    /// Checks the declared keys against the arguments of the method at one site. `all` are the model's applied methods.
    ///
    /// # Errors
    ///
    /// A key has a value with which PEFT computes something else than the method.
    pub fn check_values(
        &self,
        counterpart: &Counterpart,
        applied: &AppliedMethod,
        all: &[AppliedMethod],
    ) -> Result<(), String> {
        let method = &counterpart.method;
        let known: BTreeMap<String, ConfigValue> =
            applied.model_values.iter().chain(&applied.args).map(|(k, v)| (k.clone(), v.clone())).collect();
        let somewhere = |name: &str, own: &ConfigValue| {
            let of = all.iter().filter(|a| a.method == applied.method && a.kind == applied.kind);
            match of.filter_map(|a| a.args.get(name)).any(|x| *x == ConfigValue::Bool(true)) {
                true => ConfigValue::Bool(true),
                false => own.clone(),
            }
        };
        for key in &counterpart.keys {
            let Rule::Is { values, hint, .. } = &key.rule else { continue };
            let found = self.map.get(&key.name).unwrap_or(&Value::Null);
            let conditional = counterpart.conditions.iter().any(|c| c.key == key.name && same(found, &c.value));
            let fits = |value: &Constant| match value {
                Constant::Null => unset(found),
                Constant::Value(value) => same(found, value),
                // PEFT's flag is set for the whole adapter if it is on at one module; the others have no such tensor.
                Constant::Name(name) => match known.get(name).map(|own| somewhere(name, own)) {
                    // A number that the shape or scale of a tensor depends on is compared when the tensor is read.
                    Some(ConfigValue::Int(_) | ConfigValue::Float(_))
                        if self.is_read_from_tensors(counterpart, name) =>
                    {
                        true
                    }
                    Some(value) => same(found, &value),
                    None => true,
                },
            };
            let missing = unset(found) && !values.iter().any(|v| matches!(v, Constant::Null));
            if conditional || missing && self.is_off_by_default(values, &known) || values.iter().any(fits) {
                continue;
            }
            let words = values.iter().map(|v| match v {
                Constant::Null => "null".to_owned(),
                Constant::Value(value) => text(value),
                Constant::Name(name) => known.get(name).map(text).unwrap_or_default(),
            });
            let conditions = counterpart.conditions.iter().filter(|c| c.key == key.name);
            let wanted: Vec<String> = words.chain(conditions.map(|c| text(&c.value))).collect();
            let found = &*found.to_string();
            let here = format!("`{}` is {found} in {CONFIG}", key.name);
            let hint = hint.as_ref().map(|h| format!("; {h}")).unwrap_or_default();
            return Err(match &values[..] {
                [Constant::Name(name)] if applied.args.contains_key(name) => {
                    format!("{here}, `{method}` here has `{name}: {}`; write `{name}: {found}`", wanted[0])
                }
                [Constant::Name(_)] => format!("{here}, the spec's model has {}", wanted[0]),
                _ => {
                    let others = library::methods_declaring(&counterpart.peft_type, &key.name, found);
                    let others = others.iter().map(|o| format!("; apply `{o}`")).collect::<String>();
                    format!("{here}, which `{method}` does not compute; it is {}{hint}{others}", wanted.join(" or "))
                }
            });
        }
        Ok(())
    }

    /// Whether PEFT's default for an absent key agrees: flags are off.
    fn is_off_by_default(&self, values: &[Constant], known: &BTreeMap<String, ConfigValue>) -> bool {
        values.iter().all(|v| match v {
            Constant::Name(name) => !matches!(known.get(name), Some(ConfigValue::Bool(true))),
            Constant::Value(value) => *value != ConfigValue::Bool(true) || values.len() > 1,
            Constant::Null => true,
        })
    }

    /// Whether the parameter determines the scale or the shape of a tensor, and is therefore compared there.
    fn is_read_from_tensors(&self, counterpart: &Counterpart, name: &str) -> bool {
        use peft_grammar::counterpart::Axis;
        let axis = |a: &Axis| matches!(a, Axis::Param(n) if n == name);
        counterpart.scale().is_some_and(|s| s.names().contains(&name))
            || counterpart.tensors.iter().flat_map(|t| &t.axes).any(axis)
    }

    /// PEFT's numeric parameters at a module: from the keys, then from the conditions on other keys.
    ///
    /// # Errors
    ///
    /// A number is missing or is not a number.
    pub fn numbers(&self, counterpart: &Counterpart, module: &str) -> Result<BTreeMap<String, f64>, String> {
        let mut known = BTreeMap::new();
        for key in &counterpart.keys {
            let Rule::Is { values, patterns, .. } = &key.rule else { continue };
            let [Constant::Name(name)] = &values[..] else { continue };
            if let Some(x) = self.number_at(&key.name, patterns.as_deref(), module)? {
                known.insert(name.clone(), x);
            } else if self.is_read_from_tensors(counterpart, name) {
                return Err(match self.get(&key.name) {
                    Some(other) => format!("`{}` of {CONFIG} is {other}, but should be a number", key.name),
                    None => format!("{CONFIG} has no `{}`, which PEFT always writes: fetch the file again", key.name),
                });
            }
        }
        for condition in self.conditions(counterpart) {
            if let Consequence::Set { name, value } = &condition.then {
                let x = value.value(&known).map_err(|unknown| format!("{CONFIG} says nothing of `{unknown}`"))?;
                known.insert(name.clone(), x);
            }
        }
        Ok(known)
    }

    /// The key that determines a parameter at a module, for messages; empty if there is none.
    ///
    /// # Errors
    ///
    /// A pattern is not a valid expression.
    pub fn key_of<'c>(&self, counterpart: &'c Counterpart, name: &str, module: &str) -> Result<&'c str, String> {
        for key in &counterpart.keys {
            let Rule::Is { values, patterns, .. } = &key.rule else { continue };
            if matches!(&values[..], [Constant::Name(n)] if n == name) {
                let patterns = patterns.as_deref();
                let by_pattern = patterns.is_some() && self.number_at("", patterns, module)?.is_some();
                return Ok(if by_pattern { patterns.unwrap_or_default() } else { &key.name });
            }
        }
        Ok("")
    }

    /// The counterpart's conditions that hold for these settings.
    fn conditions<'c>(&self, counterpart: &'c Counterpart) -> Vec<&'c Condition> {
        let holds = |c: &&Condition| self.get(&c.key).is_some_and(|found| same(found, &c.value));
        counterpart.conditions.iter().filter(holds).collect()
    }

    /// The residual at a module: the part of the base matrix that the adapter is initialised with, its rank, and its
    /// factor. `None` if the adapter has no residual.
    ///
    /// # Errors
    ///
    /// A number that it depends on is missing.
    pub fn residual(&self, counterpart: &Counterpart, module: &str) -> Result<Option<(Part, usize, f64)>, String> {
        for condition in self.conditions(counterpart) {
            let Consequence::Residual { scale, part, rank } = &condition.then else { continue };
            let known = self.numbers(counterpart, module)?;
            let value = |s: &peft_grammar::counterpart::Scalar| {
                s.value(&known).map_err(|unknown| format!("{CONFIG} says nothing of `{unknown}`"))
            };
            return Ok(Some((*part, value(rank)? as usize, value(scale)?)));
        }
        Ok(None)
    }

    /// The number for a module: that of the first pattern that matches the module, else that of the key.
    fn number_at(&self, key: &str, patterns: Option<&str>, module: &str) -> Result<Option<f64>, String> {
        let pattern = patterns.and_then(|p| Some((p, self.get(p)?)));
        if let Some((name, value)) = pattern {
            let map =
                value.as_object().ok_or_else(|| format!("`{name}` of {CONFIG} is {value}, but should be an object"))?;
            for (expression, value) in map {
                // As in PEFT, a pattern matches the end of the module's name after a dot.
                if matches(name, &format!(r"^(?:(.*\.)?({expression})$)"), module)? {
                    let x = value.as_f64().ok_or_else(|| {
                        format!("`{name}` of {CONFIG} gives `{expression}` {value}, but should give a number")
                    })?;
                    return Ok(Some(x));
                }
            }
        }
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) => Ok(Some(x)),
                None if value.is_boolean() || value.is_string() => Ok(None),
                None => Err(format!("`{key}` of {CONFIG} is {value}, but should be a number")),
            },
        }
    }

    /// The key by which PEFT excludes this module from the adapter; `None` if PEFT adapts it.
    ///
    /// # Errors
    ///
    /// A key is malformed.
    pub fn key_excluding(&self, module: &str) -> Result<Option<&'static str>, String> {
        const TARGETS: &str = "target_modules";
        let ends = |name: &str| module == name || module.ends_with(&format!(".{name}"));
        let excluded = match self.get("exclude_modules") {
            Some(Value::String(expression)) => matches("exclude_modules", &format!("^(?:{expression})$"), module)?,
            _ => self.strings("exclude_modules")?.iter().any(|name| ends(name)),
        };
        let mut saved = false;
        for name in self.strings(SAVED)? {
            saved |= covers(name, module)?;
        }
        if excluded || saved {
            return Ok(Some(if excluded { "exclude_modules" } else { SAVED }));
        }
        let names = match self.get("target_modules") {
            None => return Ok(None),
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => return Ok(None),
            Some(Value::String(expression)) => {
                let found = matches(TARGETS, &format!("^(?:{expression})$"), module)?;
                return Ok((!found).then_some(TARGETS));
            }
            Some(_) => self.strings(TARGETS)?,
        };
        if names.contains(&module) {
            return Ok(None);
        }
        if !names.iter().any(|name| ends(name)) {
            return Ok(Some(TARGETS));
        }
        let layers = self.layers()?;
        if layers.is_empty() {
            return Ok(None);
        }
        let patterns = self.strings("layers_pattern")?;
        let expressions = match patterns.is_empty() {
            true => vec![r"^(?:.*?\.[^.]*\.(\d+)\.)".to_owned()],
            false => patterns.iter().map(|p| format!(r"^(?:(?:^|.*?\.){p}\.(\d+)\.)")).collect(),
        };
        for expression in expressions {
            let found =
                regex("layers_pattern", &expression)?.captures(module).map_err(|e| broken("layers_pattern", &e))?;
            if let Some(found) = found {
                let last = found.iter().flatten().last().and_then(|m| m.as_str().parse::<u64>().ok());
                let here = last.is_some_and(|layer| layers.contains(&layer));
                return Ok((!here).then_some("layers_to_transform"));
            }
        }
        Ok(Some(if patterns.is_empty() { "layers_to_transform" } else { "layers_pattern" }))
    }

    /// The layers of `layers_to_transform`; empty if absent.
    fn layers(&self) -> Result<Vec<u64>, String> {
        let wrong =
            || format!("`layers_to_transform` of {CONFIG} should be the number of a layer or a list of numbers");
        match self.get("layers_to_transform") {
            None => Ok(vec![]),
            Some(Value::Array(all)) => all.iter().map(|v| v.as_u64().ok_or_else(wrong)).collect(),
            Some(one) => Ok(vec![one.as_u64().ok_or_else(wrong)?]),
        }
    }
}

/// The key with the modules that are saved whole.
pub const SAVED: &str = "modules_to_save";

/// Whether an entry of [`SAVED`] is the module or contains it.
///
/// # Errors
///
/// The entry is not a valid expression.
pub fn covers(entry: &str, module: &str) -> Result<bool, String> {
    matches(SAVED, &format!(r"^(?:(^|.*\.){entry}($|\..*))"), module)
}

/// The error for an expression that cannot be compiled or matched.
fn broken(key: &str, why: &dyn std::fmt::Display) -> String {
    format!("`{key}` of {CONFIG} holds an expression that cannot be matched: {why}")
}

fn regex(key: &str, expression: &str) -> Result<Regex, String> {
    // Python's `\Z`, the end of the text, is `\z` here.
    Regex::new(&expression.replace(r"\Z", r"\z")).map_err(|e| broken(key, &e))
}

fn matches(key: &str, expression: &str, module: &str) -> Result<bool, String> {
    regex(key, expression)?.is_match(module).map_err(|e| broken(key, &e))
}

/// The most frequent value of a parameter, and the values of the modules that have another.
pub fn by_module<'m>(modules: &[(&'m str, Value)]) -> (Value, BTreeMap<&'m str, Value>) {
    let count = |value: &Value| modules.iter().filter(|(_, v)| v == value).count();
    let mut best = (0, Value::Null);
    for (_, value) in modules {
        if count(value) > best.0 {
            best = (count(value), value.clone());
        }
    }
    let others = modules.iter().filter(|(_, v)| *v != best.1).map(|(name, v)| (*name, v.clone())).collect();
    (best.1, others)
}

/// A number as PEFT writes it: whole numbers without a fraction, 32 and not 32.0.
pub fn plain(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { Value::from(x as i64) } else { Value::from(x) }
}

/// A setting's value as JSON.
pub fn json(value: &ConfigValue) -> Value {
    match (value, number(value)) {
        (_, Some(x)) => plain(x),
        (ConfigValue::Bool(b), _) => Value::from(*b),
        (ConfigValue::Str(s), _) => Value::from(s.as_str()),
        _ => Value::Null,
    }
}

/// PEFT's numeric parameters at a module that an export writes. A parameter that is an axis is the total of all
/// applications. If that changes the scale, the scale's other parameter is adjusted so that the scale is that of the
/// first application.
///
/// # Errors
///
/// A parameter of the scale is not a number.
pub fn settings(module: &Module) -> Result<BTreeMap<String, f64>, String> {
    let application: &Application = &module.applications[0];
    let mut known = application.numbers();
    let Some(scale) = application.counterpart.scale() else { return Ok(known) };
    let no = |name: String| format!("`{}` has no number `{name}`", application.applied.method);
    let wanted = scale.value(&known).map_err(no)?;
    let axes: Vec<&str> = application
        .counterpart
        .tensors
        .iter()
        .flat_map(|t| &t.axes)
        .filter_map(|a| match a {
            peft_grammar::counterpart::Axis::Param(name) => Some(name.as_str()),
            _ => None,
        })
        .collect();
    for axis in &axes {
        known.insert(axis.to_string(), module.total(axis) as f64);
    }
    let free = scale.names().into_iter().find(|n| !axes.contains(n)).map(str::to_owned);
    let found = scale.value(&known).map_err(no)?;
    if let (Some(free), true) = (free, found != wanted && found != 0.0) {
        // Rounding to nine decimals removes the rounding error of the two divisions.
        let x = known[&free] * wanted / found;
        known.insert(free, (x * 1e9).round() / 1e9);
    }
    Ok(known)
}
