// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The store's contents as commands and the status page show them: [`rows`], and text in columns, [`table`].

pub mod rows;
pub mod table;
