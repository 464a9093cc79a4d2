//! Files of `torch.save`: which tensors the state dict holds, and where in the file their numbers are.
//!
//! The file is a zip archive. A pickle in it says what was saved, with the tensors as views of storages; a storage's bytes are an entry of
//! their own. Only calls of the functions that PyTorch rebuilds a tensor with are understood, and none is made.

use std::{collections::BTreeMap, ops::Range};

use safetensors::Dtype;

use super::{
    archive::Archive,
    files::shown,
    header::Place,
    layout::Layout,
    pickle::{Id, Pickle, Value},
};

/// Where a state dict is in what was saved, if that isn't one itself.
const NESTS: [&str; 4] = ["model", "state_dict", "module", "model_state_dict"];
/// How many dicts may be around the state dict, and calls around a tensor's.
const DEPTH: usize = 3;
/// The most dimensions that a tensor may have.
const MAX_DIMENSIONS: usize = 16;

/// What every zip archive begins with.
pub(super) fn is_archive(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK")
}

/// Whether `bytes` are what `torch.save` wrote before PyTorch 1.6: a pickle of the number 0x1950a86a20f9469cfc6c first.
pub(super) fn is_old(bytes: &[u8]) -> bool {
    const MAGIC: [u8; 12] = [0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
    bytes.get(2..).is_some_and(|rest| rest.starts_with(&MAGIC))
}

/// The tensors of the state dict in the file `bytes`.
pub(super) fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, Layout>, String> {
    let archive = Archive::open(bytes)?;
    check_byte_order(&archive, bytes)?;
    let pickle = Pickle::read(&bytes[archive.pickle()?]).map_err(|problem| format!("data.pkl: {problem}"))?;
    let saved = Saved { archive, pickle };
    let mut tensors = BTreeMap::new();
    for &(key, value) in saved.state_dict()? {
        let Some((name, layout)) = saved.entry(key, value)? else { continue };
        if tensors.contains_key(name) {
            return Err(format!("two tensors are called {}", shown(name)));
        }
        tensors.insert(name.to_string(), layout);
    }
    Ok(tensors)
}

fn check_byte_order(archive: &Archive, bytes: &[u8]) -> Result<(), String> {
    let Some(place) = archive.byte_order() else { return Ok(()) };
    match &bytes[place?] {
        b"little" => Ok(()),
        other => {
            let order = shown(&String::from_utf8_lossy(other));
            Err(format!("was written with the byte order {order}, expected \"little\""))
        }
    }
}

/// What was saved.
struct Saved<'a> {
    archive: Archive,
    pickle: Pickle<'a>,
}

impl<'a> Saved<'a> {
    fn state_dict(&self) -> Result<&[(Id, Id)], String> {
        let root = self.pickle.get(self.pickle.root());
        let Value::Dict(items) = root else {
            return Err(format!("holds {}, expected a state dict: save that of the model", root.kind()));
        };
        let missing = || format!("holds a dict without tensors, and none under {}", NESTS.join(", "));
        self.find(items, DEPTH).ok_or_else(missing)
    }

    /// The innermost dict with tensors, for a state dict holds no dicts.
    fn find<'s>(&'s self, items: &'s [(Id, Id)], depth: usize) -> Option<&'s [(Id, Id)]> {
        let inside = depth.checked_sub(1);
        let inner = || NESTS.iter().find_map(|nest| self.find(self.dict_under(items, nest)?, inside?));
        let own = || items.iter().any(|&(_, value)| self.is_tensor(value)).then_some(items);
        inner().or_else(own)
    }

    fn dict_under(&self, items: &[(Id, Id)], nest: &str) -> Option<&[(Id, Id)]> {
        let is_nest = |&&(key, _): &&(Id, Id)| matches!(self.pickle.get(key), Value::Text(text) if *text == nest);
        let &(_, value) = items.iter().find(is_nest)?;
        if let Value::Dict(inner) = self.pickle.get(value) { Some(inner) } else { None }
    }

    /// Whether a value is made by a function that rebuilds tensors.
    fn is_tensor(&self, value: Id) -> bool {
        let Value::Call { function, .. } = *self.pickle.get(value) else { return false };
        matches!(self.pickle.get(function), Value::Global { module, name } if rebuilds(module, name))
    }

    /// A tensor of the state dict, with its name; None for anything else that a state dict may hold.
    fn entry(&self, key: Id, value: Id) -> Result<Option<(&'a str, Layout)>, String> {
        if !self.is_tensor(value) {
            return Ok(None);
        }
        let Value::Text(name) = *self.pickle.get(key) else {
            return Err(format!("a tensor's name is {}, expected text", self.pickle.get(key).kind()));
        };
        let layout = self.tensor(value, DEPTH).map_err(|problem| format!("tensor {} {problem}", shown(name)))?;
        Ok(Some((name, layout)))
    }

    fn tensor(&self, value: Id, depth: usize) -> Result<Layout, String> {
        match *self.pickle.get(value) {
            Value::Call { function, arguments } => self.rebuilt(function, arguments, depth),
            ref other => Err(format!("is made of {}", other.kind())),
        }
    }

    /// The tensor that a call of `function` would make.
    fn rebuilt(&self, function: Id, arguments: Id, depth: usize) -> Result<Layout, String> {
        let Value::Global { module, name } = *self.pickle.get(function) else {
            return Err(format!("is made by {}", self.pickle.get(function).kind()));
        };
        let arguments = self.tuple(arguments)?;
        match (module, name, arguments) {
            // One more argument would say that the numbers are to be negated or conjugated.
            ("torch._utils", "_rebuild_tensor", &[storage, offset, shape, strides])
            | ("torch._utils", "_rebuild_tensor_v2", &[storage, offset, shape, strides, _, _]) => {
                self.view(self.storage(storage, None)?, offset, shape, strides)
            }
            ("torch._utils", "_rebuild_tensor_v3", &[storage, offset, shape, strides, _, _, dtype]) => {
                self.view(self.storage(storage, Some(dtype))?, offset, shape, strides)
            }
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state", &[data, ..]) if depth > 0 => {
                self.tensor(data, depth - 1)
            }
            ("torch._tensor", "_rebuild_from_type_v2", &[function, _, arguments, ..]) if depth > 0 => {
                self.rebuilt(function, arguments, depth - 1)
            }
            _ => {
                let function = shown(&format!("{module}.{name}"));
                Err(format!("is made by {function} of {} arguments, which is not read here", arguments.len()))
            }
        }
    }

    /// The storage that `value` refers to, with numbers of `dtype` or of the type that its class says.
    fn storage(&self, value: Id, dtype: Option<Id>) -> Result<Storage, String> {
        let Value::Persistent(reference) = *self.pickle.get(value) else {
            return Err(format!("is a view of {}, expected a storage", self.pickle.get(value).kind()));
        };
        let &[tag, class, key, _, count] = self.tuple(reference)? else {
            return Err(format!("is a view of a storage said in {} parts, expected 5", self.tuple(reference)?.len()));
        };
        let (Value::Text("storage"), Value::Text(key)) = (self.pickle.get(tag), self.pickle.get(key)) else {
            return Err("is a view of something that is no storage".into());
        };
        let class = self.element_type(class)?;
        let dtype = dtype.map_or(Ok(class), |dtype| self.element_type(dtype))?;
        let bytes = self.archive.storage(key)?;
        let (count, class) = (self.size(count)?, width(class));
        if count.checked_mul(class) != Some(bytes.len()) {
            let storage = shown(key);
            return Err(format!("storage {storage} is {} bytes, expected {count} numbers of {class}", bytes.len()));
        }
        Ok(Storage { bytes, dtype })
    }

    /// The type that a class of storages or a dtype of PyTorch stands for.
    fn element_type(&self, value: Id) -> Result<Dtype, String> {
        let Value::Global { module, name } = *self.pickle.get(value) else {
            return Err(format!("has {} for a type", self.pickle.get(value).kind()));
        };
        let known = if module.split('.').next() == Some("torch") { element_type(name) } else { None };
        known.ok_or_else(|| format!("holds numbers of {}, which is not read here", shown(&format!("{module}.{name}"))))
    }

    /// The view of `storage` from number `offset` on.
    fn view(&self, storage: Storage, offset: Id, shape: Id, strides: Id) -> Result<Layout, String> {
        let (offset, shape, strides) = (self.size(offset)?, self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("has shape {shape:?} and strides {strides:?}, expected as many"));
        }
        let problem = || {
            let (bytes, dtype) = (storage.bytes.len(), storage.dtype);
            format!(
                "has shape {shape:?} and strides {strides:?} from number {offset} on, more than its {bytes} bytes of {dtype} hold"
            )
        };
        let bytes = storage.span(offset, &shape, &strides).ok_or_else(problem)?;
        let strides = (!is_row_major(&shape, &strides)).then_some(strides);
        Ok(Layout { place: Place { dtype: storage.dtype, shape, bytes }, strides })
    }

    fn tuple(&self, value: Id) -> Result<&[Id], String> {
        match self.pickle.get(value) {
            Value::Tuple(items) => Ok(items),
            other => Err(format!("has {}, expected a tuple", other.kind())),
        }
    }

    fn sizes(&self, value: Id) -> Result<Vec<usize>, String> {
        let items = self.tuple(value)?;
        if items.len() > MAX_DIMENSIONS {
            return Err(format!("has {} dimensions, expected at most {MAX_DIMENSIONS}", items.len()));
        }
        items.iter().map(|&item| self.size(item)).collect()
    }

    fn size(&self, value: Id) -> Result<usize, String> {
        let found = self.pickle.get(value);
        let size = if let Value::Int(number) = *found { usize::try_from(number).ok() } else { None };
        size.ok_or_else(|| format!("has {}, expected a size", found.kind()))
    }
}

/// The bytes of a storage, and what they are numbers of.
struct Storage {
    bytes: Range<usize>,
    dtype: Dtype,
}

impl Storage {
    /// The bytes from the first to the last number of a view. None if it reaches beyond the storage, or holds more numbers than that, as
    /// one does that repeats some: what is made of it is no larger than the file.
    fn span(&self, offset: usize, shape: &[usize], strides: &[usize]) -> Option<Range<usize>> {
        let width = width(self.dtype);
        let begin = offset.checked_mul(width)?.checked_add(self.bytes.start)?;
        let length = shape.iter().try_fold(width, |length: usize, &size| length.checked_mul(size))?;
        if length == 0 {
            return (begin <= self.bytes.end).then_some(begin..begin);
        }
        let reach = |last: usize, (size, stride): (&usize, &usize)| last.checked_add((size - 1).checked_mul(*stride)?);
        let last = shape.iter().zip(strides).try_fold(0, reach)?;
        let end = last.checked_add(1)?.checked_mul(width)?.checked_add(begin)?;
        (end <= self.bytes.end && length <= self.bytes.len()).then_some(begin..end)
    }
}

/// Whether a view's numbers lie one after the other. A dimension of one number is never stepped along.
fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    let fits = |(&size, &stride): (&usize, &usize)| {
        let fits = size == 1 || stride == expected;
        expected *= size;
        fits
    };
    shape.contains(&0) || shape.iter().zip(strides).rev().all(fits)
}

/// Whether Python's function of that name makes a tensor from its parts.
fn rebuilds(module: &str, name: &str) -> bool {
    module.split('.').next() == Some("torch") && name.starts_with("_rebuild")
}

fn width(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// The type that PyTorch's name of a class of storages, or of a dtype, stands for. A storage without a type is one of bytes.
fn element_type(name: &str) -> Option<Dtype> {
    Some(match name {
        "BoolStorage" | "bool" => Dtype::BOOL,
        "ByteStorage" | "UntypedStorage" | "uint8" => Dtype::U8,
        "CharStorage" | "int8" => Dtype::I8,
        "ShortStorage" | "int16" => Dtype::I16,
        "uint16" => Dtype::U16,
        "IntStorage" | "int32" => Dtype::I32,
        "uint32" => Dtype::U32,
        "LongStorage" | "int64" => Dtype::I64,
        "uint64" => Dtype::U64,
        "HalfStorage" | "float16" => Dtype::F16,
        "BFloat16Storage" | "bfloat16" => Dtype::BF16,
        "FloatStorage" | "float32" => Dtype::F32,
        "DoubleStorage" | "float64" => Dtype::F64,
        "ComplexFloatStorage" | "complex64" => Dtype::C64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        _ => return None,
    })
}
